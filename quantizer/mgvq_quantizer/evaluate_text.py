"""How far a checkpoint is from its reference on plain text, and the perplexity of both.

Called by `evaluate_cli`, `baselines` and `benchmarks`. The text is cut into windows as calibration
text is (`plain_text`); every token of a window but the first is predicted, from those before it in
the window. Standard errors are over windows: tokens of one window are not independent.
Not here: questions about pictures (`evaluate`).
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from mgvq_quantizer.archive import DataError
from mgvq_quantizer.batches import TokenBatch, embed, make_batch
from mgvq_quantizer.evaluate import bits_by_group, to_dense
from mgvq_quantizer.plain_text import Passage, read_passages, text_sample
from mgvq_quantizer.teacher import divergence
from mgvq_runtime.checkpoint.reader import Checkpoint, open_checkpoint
from mgvq_runtime.models.causal_lm import CausalLM
from mgvq_runtime.models.loading import fill_model
from mgvq_runtime.tokenizer import Tokenizer

DEFAULT_TOKENS = 16384
"""Tokens to predict on: the fewest of which figures should be published."""
_LOGIT_ROWS = 512
"""Rows of `V` logits held at once, twice."""


@dataclass(frozen=True)
class TextEvaluation:
    """The outcome for a checkpoint; fields are the keys of the JSON line."""

    kl: float
    """KL(reference || checkpoint) in nats, mean over predicted tokens."""
    kl_se: float
    """Its standard error over windows."""
    perplexity: float
    """`exp` of the checkpoint's mean negative log-likelihood of the text."""
    reference_perplexity: float
    top1_agreement: float
    """Share of tokens where both find the same token most probable."""
    n: int
    """Windows."""
    n_tokens: int
    """Predicted tokens."""
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
        text: a `.txt` file in UTF-8, or a folder or zip file of them.
        max_tokens: tokens to read at most; windows are drawn evenly from the text.
        device: where to compute, in float32.
        show_progress: draw a progress bar on stderr.

    Raises:
        CheckpointError: if a folder cannot be loaded.
        DataError: if the text cannot be used, or the two have other numbers of tokens.
    """
    started = time.monotonic()
    opened = open_checkpoint(checkpoint)
    models = [to_dense(fill_model(c, device)) for c in (opened, open_checkpoint(reference))]
    batches = read_windows(text, reference, max_tokens, device)
    _check_vocabularies(models[0], models[1])
    bar = tqdm(batches, unit="window", disable=not show_progress)
    return _finish([_read(models, batch) for batch in bar], opened, started)


def read_windows(
    text: Path, model: Path, max_tokens: int, device: torch.device | str
) -> list[TokenBatch]:
    """Return windows evenly drawn from a text, one a batch.

    Args:
        text: see `evaluate_text`.
        model: the folder whose tokenizer cuts it.
        max_tokens: tokens to read at most.
        device: where the batches lie.

    Raises:
        DataError: if the text cannot be used.
    """
    passages = draw(read_passages(text, Tokenizer.from_folder(model)), max_tokens)
    return [make_batch([text_sample(passage)], device) for passage in passages]


@torch.no_grad()
def perplexity(model: CausalLM, windows: Sequence[TokenBatch]) -> float:
    """Return `exp` of a model's mean negative log-likelihood of some windows of text."""
    loss, tokens = 0.0, 0
    for batch in windows:
        targets = batch.token_ids[batch.answer_rows + 1]  # [A]
        parts = zip(_log_probs(model, batch), torch.split(targets, _LOGIT_ROWS), strict=True)
        loss -= sum(_sum_at(rows, part) for rows, part in parts)
        tokens += len(targets)
    return math.exp(loss / tokens)


def draw(passages: Sequence[Passage], max_tokens: int) -> list[Passage]:
    """Return passages evenly drawn from all of them, at most so many tokens, at least one.

    Short last passages count as whole ones.
    """
    longest = max(len(passage.token_ids) for passage in passages)
    count = min(len(passages), max(1, max_tokens // longest))
    step = len(passages) / count
    return [passages[int(i * step)] for i in range(count)]


def _check_vocabularies(model: CausalLM, reference: CausalLM) -> None:
    sizes = [len(m.get_parameter("model.embed_tokens.weight")) for m in (model, reference)]
    if sizes[0] != sizes[1]:
        raise DataError(
            f"the checkpoint knows {sizes[0]} tokens, the reference {sizes[1]}: give the folder "
            "the checkpoint was made from"
        )


def _read(models: Sequence[CausalLM], batch: TokenBatch) -> _Window:
    """Let the checkpoint and the reference predict one window."""
    targets = batch.token_ids[batch.answer_rows + 1]  # [A]
    kl, loss, reference_loss, agreed = 0.0, 0.0, 0.0, 0
    said = (_log_probs(model, batch) for model in models)
    for mine, other, target in zip(*said, torch.split(targets, _LOGIT_ROWS), strict=True):
        kl += float(divergence(other, mine).double().sum())
        loss -= _sum_at(mine, target)
        reference_loss -= _sum_at(other, target)
        agreed += int((mine.argmax(-1) == other.argmax(-1)).sum())
    return _Window(len(targets), kl, loss, reference_loss, agreed)


def _log_probs(model: CausalLM, batch: TokenBatch) -> Iterator[Tensor]:
    """Yield what a model predicts behind each token of a window, some rows `[a, V]` at a time."""
    hidden = model(embed(model, batch, {}), batch.forward)[batch.answer_rows]  # [A, D]
    for rows in torch.split(hidden, _LOGIT_ROWS):
        yield model.logits(rows).log_softmax(-1)


def _sum_at(log_probs: Tensor, targets: Tensor) -> float:
    return float(log_probs.gather(1, targets[:, None]).double().sum())


def _finish(windows: Sequence[_Window], opened: Checkpoint, started: float) -> TextEvaluation:
    tokens = sum(window.tokens for window in windows)
    means = [window.kl / window.tokens for window in windows]
    bits = bits_by_group(opened)
    spread = statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else math.nan
    return TextEvaluation(
        kl=sum(window.kl for window in windows) / tokens,
        kl_se=spread,
        perplexity=math.exp(sum(window.loss for window in windows) / tokens),
        reference_perplexity=math.exp(sum(window.reference_loss for window in windows) / tokens),
        top1_agreement=sum(window.agreed for window in windows) / tokens,
        n=len(windows),
        n_tokens=tokens,
        bits_per_weight=bits["decoder"],
        bits_per_weight_by_group=bits,
        file_bytes=sum(f.stat().st_size for f in opened.path.glob("*.safetensors")),
        seconds=time.monotonic() - started,
    )
