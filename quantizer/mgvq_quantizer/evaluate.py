"""How far a checkpoint is from its reference, and how many questions it gets right.

Called by `evaluate_cli`, `baselines` and `benchmarks`. Answers are fed to the model (teacher
forcing): the divergence is measured on every answer token, the end token included, and a model
answers exactly right if and only if each of these tokens is its most probable one - which is what
greedy generation does, without generating. Pictures are encoded once, and the prompt that questions
on the same pictures have in common runs once (`shared_prefix`).
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mgvq_kernels import ops
from mgvq_quantizer.archive import Archive, DataError
from mgvq_quantizer.calibration import end_of_turn
from mgvq_quantizer.questions import Question, find_questions, load_questions
from mgvq_quantizer.shared_prefix import Asked, Exam, answer_states, make_exam
from mgvq_quantizer.teacher import divergence
from mgvq_runtime.checkpoint.bits import counted_bits_per_weight
from mgvq_runtime.checkpoint.reader import Checkpoint, open_checkpoint
from mgvq_runtime.errors import MgvqError
from mgvq_runtime.layers.embedding import TiedHead, VQEmbedding
from mgvq_runtime.layers.vq_matrix import VQMatrix
from mgvq_runtime.models.causal_lm import CausalLM
from mgvq_runtime.models.config import ModelConfig
from mgvq_runtime.models.loading import fill_model
from mgvq_runtime.multimodal.chat import ChatProcessor
from mgvq_runtime.multimodal.image import decode_image
from mgvq_runtime.multimodal.prompt import build_prompt
from mgvq_runtime.request import ImageInput, Prompt
from mgvq_runtime.tokenizer import Tokenizer

_CHUNK_QUESTIONS = 256
_LOGIT_ROWS = 512
"""Rows of `V` logits held at once, twice."""


@dataclass(frozen=True)
class Marks:
    """What a model said to the questions."""

    kl: float
    """KL(reference || checkpoint) in nats, mean over answer tokens."""
    kl_se: float
    """Its standard error over questions."""
    top1_agreement: float
    """Share of answer tokens where both find the same token most probable."""
    accuracy: float
    """Share of questions the checkpoint answers exactly."""
    accuracy_se: float
    reference_accuracy: float
    accuracy_by_kind: dict[str, float]
    reference_accuracy_by_kind: dict[str, float]
    n: int
    """Questions."""
    n_tokens: int
    """Answer tokens, end tokens included."""


@dataclass(frozen=True)
class Evaluation(Marks):
    """The outcome for a checkpoint; fields are the keys of the JSON line."""

    bits_per_weight: float
    """Of the decoder's linear layers, in full."""
    bits_per_weight_by_group: dict[str, float]
    file_bytes: int
    """Of the checkpoint's weight files."""
    seconds: float


@dataclass
class _Sums:
    """Running totals over questions."""

    kl: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    agreed: int = 0
    right: dict[str, list[bool]] = field(default_factory=lambda: defaultdict(list))
    reference_right: dict[str, list[bool]] = field(default_factory=lambda: defaultdict(list))


@torch.no_grad()
def evaluate(
    checkpoint: Path,
    reference: Path,
    questions: Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    show_progress: bool = True,
) -> Evaluation:
    """Compare a checkpoint with its reference.

    Args:
        checkpoint: a folder, quantized or not.
        reference: the folder it was made from.
        questions: a question file; None takes the checkpoint's `questions.zip`, else the
            reference's.
        limit: most questions.
        seed: of the draw where `limit` cuts.
        device: where to compute, in float32.
        show_progress: draw a progress bar on stderr.

    Raises:
        CheckpointError: if a folder cannot be loaded.
        DataError: if there are no questions, or a row or picture cannot be used.
    """
    started = time.monotonic()
    archive = Archive(find_questions(questions, [checkpoint, reference]))
    opened = open_checkpoint(checkpoint)
    model = to_dense(fill_model(opened, device))
    examiner = Examiner(reference, archive, limit, seed, device, show_progress)
    marks = examiner.examine(model)
    return Evaluation(**vars(marks), **sizes_of(opened), seconds=time.monotonic() - started)


class Examiner:
    """Puts the same questions to one model after another, beside one `reference`."""

    def __init__(
        self,
        reference: Path,
        archive: Archive,
        limit: int | None = None,
        seed: int = 0,
        device: str = "cpu",
        show_progress: bool = True,
    ) -> None:
        """Load the reference and draw the questions.

        Args:
            reference: a checkpoint folder.
            archive: the opened question file.
            limit: as in `evaluate`.
            seed: as in `evaluate`.
            device: as in `evaluate`.
            show_progress: as in `evaluate`.

        Raises:
            CheckpointError: if the reference cannot be loaded.
            DataError: if there are no questions.
        """
        self._archive, self._device, self._silent = archive, device, not show_progress
        self._questions = load_questions(archive, limit, seed)
        opened = open_checkpoint(reference)
        self.reference = to_dense(fill_model(opened, device))
        self._processor = ChatProcessor.from_checkpoint(opened, self.reference.config)
        self._reference_states: dict[int, Tensor] = {}

    @property
    def fingerprint(self) -> str:
        """Tells apart draws of questions."""
        asked = [(q.kind, q.images, q.text, q.answer) for q in self._questions]
        return hashlib.blake2b(repr(asked).encode(), digest_size=16).hexdigest()

    @torch.no_grad()
    def examine(self, model: CausalLM) -> Marks:
        """Ask a model everything; the reference is asked the first time only.

        Args:
            model: in dense arithmetic, on the examiner's device.

        Raises:
            DataError: if a row or picture cannot be used, or model and reference do not read alike.
        """
        check_vocabularies(model, self.reference)
        _check_pictures(model, self.reference)
        sums = _Sums()
        bar = tqdm(total=len(self._questions), unit="question", disable=self._silent, leave=None)
        with bar:
            for i, chunk in enumerate(_chunks(self._questions)):
                asked = _prepare(self._archive, chunk, self._processor)
                exam = make_exam(asked, self._processor.config.image_token_id, self._device)
                if i not in self._reference_states:
                    self._reference_states[i] = answer_states(self.reference, exam)
                states = (answer_states(model, exam), self._reference_states[i])
                _mark(exam, (model, self.reference), states, sums)
                bar.update(len(chunk))
        return _finish(sums)


def check_vocabularies(model: CausalLM, reference: CausalLM) -> None:
    """Refuse models with other numbers of tokens.

    Raises:
        DataError: with both numbers.
    """
    sizes = [m.config.text_config.vocab_size for m in (model, reference)]
    if sizes[0] != sizes[1]:
        raise DataError(
            f"the checkpoint knows {sizes[0]} tokens, the reference {sizes[1]}: give the folder "
            "the checkpoint was made from"
        )


def _check_pictures(model: CausalLM, reference: CausalLM) -> None:
    """Refuse models of which one takes no pictures, or has another placeholder for them."""
    ours, theirs = (
        m.config.image_token_id if m.visual is not None else None for m in (model, reference)
    )
    if ours != theirs:
        raise DataError(
            f"the checkpoint's placeholder for a picture is token {ours}, the reference's {theirs} "
            "(None: it takes no pictures): give the folder the checkpoint was made from"
        )


def to_dense(model: CausalLM) -> CausalLM:
    """Replace every quantized layer by a dense one of the same values; returns the model."""
    for name, module in list(model.named_modules()):
        if not isinstance(module, VQMatrix):
            continue
        weight = nn.Parameter(ops.vq_dequantize(module.packed), requires_grad=False)
        O, I = weight.shape  # noqa: E741
        dense: nn.Linear | nn.Embedding
        with torch.device("meta"):
            if isinstance(module, VQEmbedding):
                dense = nn.Embedding(O, I)
            else:
                dense = nn.Linear(I, O, bias=False)
                dense.bias = module.bias  # type: ignore[assignment]
        dense.weight = weight
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, dense)
    if isinstance(model.lm_head, TiedHead):
        model.lm_head = TiedHead(model.model.embed_tokens)
    return model


def _chunks(questions: Sequence[Question]) -> Iterator[list[Question]]:
    """Cut questions into runs; questions on the same pictures stay together."""
    chunk: list[Question] = []
    for _, group in groupby(questions, key=lambda question: question.images):
        chunk += group
        if len(chunk) >= _CHUNK_QUESTIONS:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _prepare(
    archive: Archive, questions: Sequence[Question], processor: ChatProcessor
) -> list[Asked]:
    """Turn questions into prompts and answers in tokens; a picture is processed once a chunk."""
    tokenizer = processor.tokenizer
    end = end_of_turn(tokenizer)
    asked = []
    for _, group in groupby(questions, key=lambda question: question.images):
        same = list(group)
        try:
            pictures = [decode_image(archive.read_picture(name)) for name in same[0].images]
            inputs = processor.process(pictures)
            for question in same:
                prompt = _prompt(question, inputs, tokenizer, processor.config)
                answer = [*tokenizer.encode(question.answer), end]
                asked.append(Asked(question.kind, prompt, tuple(answer)))
        except MgvqError as error:
            raise DataError(f"{same[0].where}: {error}") from error
    return asked


def _prompt(
    question: Question, images: tuple[ImageInput, ...], tokenizer: Tokenizer, config: ModelConfig
) -> Prompt:
    """As `ChatProcessor.prepare`, with pictures that are processed already."""
    return build_prompt(tokenizer.encode_chat(question.messages), images, config)


def _mark(
    exam: Exam, models: tuple[CausalLM, CausalLM], states: tuple[Tensor, Tensor], sums: _Sums
) -> None:
    """Add up what both models say, given the final states `[A, D]` of each."""
    ours, theirs = states
    targets = exam.targets.to(ours.device)  # [A]
    divergences, agreed, right, reference_right = [], [], [], []
    for start in range(0, len(targets), _LOGIT_ROWS):
        part = slice(start, start + _LOGIT_ROWS)
        mine = models[0].logits(ours[part]).log_softmax(-1)  # [a, V]
        other = models[1].logits(theirs[part]).log_softmax(-1)
        divergences.append(divergence(other, mine))
        best, reference_best = mine.argmax(-1), other.argmax(-1)
        agreed.append(best == reference_best)
        right.append(best == targets[part])
        reference_right.append(reference_best == targets[part])
    lengths = [len(asked.answer) for asked in exam.asked]
    sums.agreed += int(torch.cat(agreed).sum())
    sums.tokens += lengths
    sums.kl += [float(part.double().sum()) for part in torch.split(torch.cat(divergences), lengths)]
    for store, flags in ((sums.right, right), (sums.reference_right, reference_right)):
        for asked, marks in zip(exam.asked, torch.split(torch.cat(flags), lengths), strict=True):
            store[asked.kind].append(bool(marks.all()))


def _finish(sums: _Sums) -> Marks:
    tokens, n = sum(sums.tokens), len(sums.tokens)
    kl = sum(sums.kl) / tokens
    spread = sum((k - kl * t) ** 2 for k, t in zip(sums.kl, sums.tokens, strict=True))
    flags = [flag for kind in sums.right.values() for flag in kind]
    accuracy = sum(flags) / n
    reference = sum(sum(kind) for kind in sums.reference_right.values()) / n
    return Marks(
        kl=kl,
        kl_se=math.sqrt(spread) / tokens,
        top1_agreement=sums.agreed / tokens,
        accuracy=accuracy,
        accuracy_se=math.sqrt(accuracy * (1 - accuracy) / n),
        reference_accuracy=reference,
        accuracy_by_kind=_means(sums.right),
        reference_accuracy_by_kind=_means(sums.reference_right),
        n=n,
        n_tokens=tokens,
    )


def sizes_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what an evaluation says of a checkpoint's size, by field."""
    bits = bits_by_group(checkpoint)
    return {
        "bits_per_weight": bits.get("decoder", 16.0),  # kept in float16
        "bits_per_weight_by_group": bits,
        "file_bytes": sum(f.stat().st_size for f in checkpoint.path.glob("*.safetensors")),
    }


def bits_by_group(checkpoint: Checkpoint) -> dict[str, float]:
    """Return stored bits a weight by group, in full; of a dense folder, its dtype's bits."""
    if checkpoint.quantization is not None:
        return counted_bits_per_weight(checkpoint.quantization.matrices)
    widths: dict[str, Any] = defaultdict(lambda: [0, 0])
    for name, tensor in checkpoint.dense.items():
        if len(tensor.shape) == 2 and name.startswith("model.layers."):
            weights = math.prod(tensor.shape)
            widths["decoder"][0] += weights * torch.finfo(tensor.dtype).bits
            widths["decoder"][1] += weights
    return {group: bits / weights for group, (bits, weights) in widths.items()}


def _means(flags: dict[str, list[bool]]) -> dict[str, float]:
    return {kind: sum(values) / len(values) for kind, values in sorted(flags.items())}
