"""How far a checkpoint is from its reference on text, and the perplexity of both.

Called by `evaluate_cli`, `baselines` and `benchmarks`. Plain text is cut into windows as
calibration text is (`plain_text`); every token of a window but the first is predicted, from those
before it in the window. A conversation is a window of which the answers are predicted. Standard
errors are over windows: tokens of one window are not independent.
Not here: questions about pictures (`evaluate`).
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from mgvq_quantizer.archive import DataError
from mgvq_quantizer.batches import TokenBatch, embed, evenly, make_batch
from mgvq_quantizer.calibration import Sample, load_conversations, prepare
from mgvq_quantizer.evaluate import check_vocabularies, sizes_of, to_dense
from mgvq_quantizer.plain_text import read_passages, text_sample
from mgvq_quantizer.teacher import divergence
from mgvq_runtime.checkpoint.reader import open_checkpoint
from mgvq_runtime.models.causal_lm import CausalLM
from mgvq_runtime.models.loading import fill_model
from mgvq_runtime.multimodal.chat import ChatProcessor

DEFAULT_TOKENS = 16384
"""Tokens to predict on: the fewest of which figures should be published."""
_LOGIT_ROWS = 512
"""Rows of `V` logits held at once, twice."""


@dataclass(frozen=True)
class TextMarks:
    """What a model said about a text."""

    kl: float
    """KL(reference || checkpoint) in nats, mean over predicted tokens."""
    kl_se: float | None
    """Its standard error over windows."""
    perplexity: float
    """`exp` of the checkpoint's mean negative log-likelihood of the text."""
    reference_perplexity: float
    top1_agreement: float
    """Share of tokens where both find the same token most probable."""
    n: int
    """Windows, or conversations."""
    n_tokens: int
    """Predicted tokens."""


@dataclass(frozen=True)
class TextEvaluation(TextMarks):
    """The outcome for a checkpoint; fields are the keys of the JSON line."""

    bits_per_weight: float
    """Of the decoder's linear layers, in full."""
    bits_per_weight_by_group: dict[str, float]
    file_bytes: int
    """Of the checkpoint's weight files."""
    seconds: float


@dataclass(frozen=True)
class _Window:
    """What both models say about one window, summed over its predicted tokens."""

    tokens: int
    kl: float
    loss: float
    """Negative log-likelihood of the checkpoint."""
    reference_loss: float
    agreed: int


@torch.no_grad()
def evaluate_text(
    checkpoint: Path,
    reference: Path,
    text: Path,
    max_tokens: int = DEFAULT_TOKENS,
    device: str = "cpu",
    show_progress: bool = True,
) -> TextEvaluation:
    """Compare a checkpoint with its reference on text.

    Args:
        checkpoint: a folder, quantized or not.
        reference: the folder it was made from; its tokenizer cuts the text.
        text: a `.txt` file in UTF-8, a folder or zip file of them, or a `.jsonl` or `.json` file
            of LLaVA conversations without pictures.
        max_tokens: tokens to read at most; windows are drawn evenly from the text.
        device: where to compute, in float32.
        show_progress: draw a progress bar on stderr.

    Raises:
        CheckpointError: if a folder cannot be loaded.
        DataError: if the text cannot be used, or the two have other numbers of tokens.
    """
    started = time.monotonic()
    opened = open_checkpoint(checkpoint)
    original = open_checkpoint(reference)
    models = [to_dense(fill_model(c, device)) for c in (opened, original)]
    processor = ChatProcessor.from_checkpoint(original, models[1].config)
    marks = TextExaminer(models[1], processor, text, max_tokens, show_progress).examine(models[0])
    return TextEvaluation(**vars(marks), **sizes_of(opened), seconds=time.monotonic() - started)


class TextExaminer:
    """Lets one model after another read the same text, beside one reference."""

    def __init__(
        self,
        reference: CausalLM,
        processor: ChatProcessor,
        text: Path,
        max_tokens: int = DEFAULT_TOKENS,
        show_progress: bool = True,
    ) -> None:
        """Draw the windows.

        Args:
            reference: in dense arithmetic.
            processor: the reference's.
            text: as in `evaluate_text`.
            max_tokens: as in `evaluate_text`.
            show_progress: as in `evaluate_text`.

        Raises:
            DataError: if the text cannot be used.
        """
        self._reference, self._silent = reference, not show_progress
        windows = draw(_read(text, processor), max_tokens)
        self._windows = [make_batch([window], reference.device) for window in windows]
        self._reference_states: dict[int, Tensor] = {}

    @property
    def fingerprint(self) -> str:
        """Tells apart draws of windows, by their tokens."""
        digest = hashlib.blake2b(digest_size=16)
        for batch in self._windows:
            digest.update(batch.token_ids.cpu().numpy().tobytes())
        return digest.hexdigest()

    @torch.no_grad()
    def examine(self, model: CausalLM) -> TextMarks:
        """Let a model read everything; the reference reads the first time only.

        Args:
            model: in dense arithmetic, on the reference's device.

        Raises:
            DataError: if model and reference have other numbers of tokens.
        """
        check_vocabularies(model, self._reference)
        windows = []
        bar = tqdm(self._windows, unit="window", disable=self._silent, leave=None)
        for i, batch in enumerate(bar):
            if i not in self._reference_states:
                self._reference_states[i] = _states(self._reference, batch)
            states = (_states(model, batch), self._reference_states[i])
            targets = batch.token_ids[batch.answer_rows + 1]  # [A]
            windows.append(_mark((model, self._reference), states, targets))
        return _finish(windows)


def draw(windows: Sequence[Sample], max_tokens: int) -> list[Sample]:
    """Return windows evenly drawn from all of them, at most so many tokens, at least one.

    All count like the longest.
    """
    longest = max(len(window.token_ids) for window in windows)
    return evenly(windows, max(1, max_tokens // longest))


def _read(text: Path, processor: ChatProcessor) -> list[Sample]:
    """Return all windows of a text, or all conversations of a file."""
    if text.suffix not in {".jsonl", ".json"}:
        return [text_sample(passage) for passage in read_passages(text, processor.tokenizer)]
    _, conversations = load_conversations(text, text.parent)
    for conversation in conversations:
        if conversation.picture_names:
            raise DataError(
                f"{conversation.where}: text is judged without pictures, but this conversation "
                "shows some: ask about pictures with --questions"
            )
    return prepare(conversations, processor, processor.tokenizer)


def _states(model: CausalLM, batch: TokenBatch) -> Tensor:
    """Return the final hidden states `[A, D]` behind each token of a window but the last."""
    return model(embed(model, batch, {}), batch.forward)[batch.answer_rows]


def _mark(
    models: tuple[CausalLM, CausalLM], states: tuple[Tensor, Tensor], targets: Tensor
) -> _Window:
    """Add up what checkpoint and reference say, given their states `[A, D]`, and targets `[A]`."""
    kl, loss, reference_loss, agreed = 0.0, 0.0, 0.0, 0
    for ours, theirs, target in zip(
        *(torch.split(rows, _LOGIT_ROWS) for rows in (*states, targets)), strict=True
    ):
        mine = models[0].logits(ours).log_softmax(-1)  # [a, V]
        other = models[1].logits(theirs).log_softmax(-1)
        kl += float(divergence(other, mine).double().sum())
        loss -= _sum_at(mine, target)
        reference_loss -= _sum_at(other, target)
        agreed += int((mine.argmax(-1) == other.argmax(-1)).sum())
    return _Window(len(targets), kl, loss, reference_loss, agreed)


def _sum_at(log_probs: Tensor, targets: Tensor) -> float:
    return float(log_probs.gather(1, targets[:, None]).double().sum())


def _finish(windows: Sequence[_Window]) -> TextMarks:
    tokens = sum(window.tokens for window in windows)
    n, kl = len(windows), sum(window.kl for window in windows) / tokens
    # Of a ratio of sums, for windows differ in length.
    squares = sum((window.kl - kl * window.tokens) ** 2 for window in windows)
    spread = math.sqrt(squares * n / (n - 1)) / tokens if n > 1 else None
    return TextMarks(
        kl=kl,
        kl_se=spread,
        perplexity=math.exp(sum(window.loss for window in windows) / tokens),
        reference_perplexity=math.exp(sum(window.reference_loss for window in windows) / tokens),
        top1_agreement=sum(window.agreed for window in windows) / tokens,
        n=n,
        n_tokens=tokens,
    )
