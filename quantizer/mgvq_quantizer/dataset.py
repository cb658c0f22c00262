"""The model and the calibration data of one run, opened (for `pipeline`, `forecast`,
`baselines`)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mgvq_quantizer import calibration, plain_text
from mgvq_quantizer.batches import deal, evenly, unique_pictures
from mgvq_quantizer.calibration import CalibrationError, Conversation, Sample
from mgvq_quantizer.plain_text import Passage
from mgvq_quantizer.recipe import QuantRecipe
from mgvq_runtime.checkpoint.reader import Checkpoint, open_checkpoint
from mgvq_runtime.errors import CheckpointError
from mgvq_runtime.models.causal_lm import CausalLM
from mgvq_runtime.multimodal.chat import ChatProcessor


@dataclass(frozen=True, eq=False)
class Data:
    """Calibration samples, ready to be run."""

    name: str
    train: list[Sample]
    heldout: list[Sample]
    swapped: list[Sample]
    """The training conversations with other pictures, for tuning."""
    fingerprint: str
    """Of what was said and shown, before a template or a processor saw it."""
    end_token_ids: frozenset[int] = frozenset()
    """Tokens with which the model ends an answer."""
    own: tuple[Sample, ...] = ()
    """The conversations that the unquantized model has answered itself (`own_answers`)."""

    @property
    def all(self) -> list[Sample]:
        """Every conversation, those held out last."""
        return [*self.train, *self.heldout]

    @property
    def unanswered(self) -> list[Sample]:
        """The conversations whose last answer is missing."""
        return [sample for sample in self.all if sample.is_unanswered]

    @property
    def answers(self) -> str:
        """Say whose the answers are."""
        own, missing = len(self.own), len(self.unanswered)
        given = len(self.all) - own - missing
        counts = {"of the data": given, "of the unquantized model": own, "missing": missing}
        parts = {whose: count for whose, count in counts.items() if count}
        if len(parts) == 1:
            return next(iter(parts))
        return ", ".join(f"{count} {whose}" for whose, count in parts.items())

    @property
    def digest(self) -> str:
        """Tells apart what the model reads: tokens, their places and pictures in patches.

        Asked before the unquantized model has answered: it names the folder of its answers.
        """
        digest = hashlib.blake2b(digest_size=16)
        for sample in self.all:
            for numbers in (sample.token_ids, sample.positions, sample.is_answer):
                digest.update(repr(numbers.shape).encode() + numbers.tobytes())
        for image in unique_pictures(self.all):
            digest.update(repr((image.grid_thw, image.layout)).encode() + image.patches.tobytes())
        return digest.hexdigest()

    def tuning_batches(self, recipe: QuantRecipe) -> list[list[Sample]]:
        """Return the batches of end-to-end tuning, one a step."""
        samples = [*self.train, *self.swapped]
        return deal(samples, recipe.tuning_steps, recipe.tuning_batch_tokens, recipe.seed)

    def drawn(self, recipe: QuantRecipe) -> list[Sample]:
        """Return those of `swapped` that tuning sees."""
        seen = {id(sample) for batch in self.tuning_batches(recipe) for sample in batch}
        return [sample for sample in self.swapped if id(sample) in seen]

    def with_answers(self, answered: Mapping[int, Sample], recipe: QuantRecipe) -> Data:
        """Return the data with samples that the model has answered itself.

        Args:
            answered: what takes the place of a sample, by its `id`; the others stay.
            recipe: how often pictures are swapped; those draws stay, too.
        """
        if not answered:
            return self
        train = [answered.get(id(sample), sample) for sample in self.train]
        heldout = [answered.get(id(sample), sample) for sample in self.heldout]
        swapped, own = _with_other_pictures(train, recipe), tuple(answered.values())
        return replace(self, train=train, heldout=heldout, swapped=swapped, own=(*self.own, *own))


def open_dense(model: Path) -> Checkpoint:
    """Open the checkpoint folder that is to be quantized.

    Raises:
        CheckpointError: if it is damaged or already quantized.
    """
    source = open_checkpoint(model)
    if source.quantization is not None:
        raise CheckpointError(f"{model} is quantized already: give the original checkpoint")
    return source


def read_data(
    folder: Path,
    graph: CausalLM,
    recipe: QuantRecipe,
    path: Path | None,
    source: Checkpoint | None = None,
) -> Data:
    """Load, thin out, tokenize and split the calibration conversations and texts.

    Args:
        folder: of the dense checkpoint.
        graph: its model.
        recipe: how many, and what share is held out.
        path: see `calibration.load_conversations`; or a `.txt` file, or a folder or zip file that
            holds some, alone or beside conversations.
        source: the folder, where it is open already.

    Raises:
        CalibrationError: if the data cannot be used.
    """
    processor = ChatProcessor.from_checkpoint(
        source or open_checkpoint(folder), graph.config, recipe.max_image_tokens
    )
    name, items = "", list[Conversation | Passage]()
    if plain_text.holds_conversations(path):
        name, conversations = calibration.load_conversations(path, folder, graph.visual is not None)
        items += conversations
    if path is not None and plain_text.holds_text(path):
        name = path.name
        items += plain_text.read_passages(path, processor.tokenizer)
    chosen = evenly(items, recipe.max_samples)
    spoken = [item for item in chosen if isinstance(item, Conversation)]
    written = [item for item in chosen if isinstance(item, Passage)]
    samples = calibration.prepare(spoken, processor, processor.tokenizer) if spoken else []
    samples += map(plain_text.text_sample, written)
    _check_lengths(samples, graph.config.text_config.max_position_embeddings)
    if len(samples) < 2:
        raise CalibrationError(
            f"{name} holds {len(samples)} conversation or passage of {plain_text.PASSAGE_TOKENS} "
            "tokens; at least 2 are needed"
        )
    digest = calibration.fingerprint(spoken)
    if written:
        digest = f"{digest}-{plain_text.fingerprint(written)}"
    data = split_data(name, samples, recipe, digest)
    return replace(data, end_token_ids=processor.tokenizer.eos_token_ids)


def split_data(name: str, samples: Sequence[Sample], recipe: QuantRecipe, digest: str) -> Data:
    """Hold some samples back, evenly drawn, and show the others other pictures.

    Args:
        name: of the data.
        samples: at least 2.
        recipe: what share is held out, how often pictures are swapped.
        digest: of the conversations and texts.
    """
    held = min(len(samples) - 1, max(1, round(len(samples) * recipe.heldout_share)))
    picked = set(evenly(range(len(samples)), held))
    train = [s for i, s in enumerate(samples) if i not in picked]
    return Data(
        name,
        train,
        [s for i, s in enumerate(samples) if i in picked],
        _with_other_pictures(train, recipe),
        digest,
    )


def check_pictures(data: Data, graph: CausalLM) -> None:
    """Refuse data without a picture for a model with a vision tower.

    Raises:
        CalibrationError: naming the data.
    """
    if graph.visual is not None and not unique_pictures(data.train):
        raise CalibrationError(
            f"{data.name} holds no picture to calibrate on: the vision tower cannot be calibrated "
            'on text alone; name pictures in the rows ("image": FILE, and <image> in the text), or '
            "give a folder that holds conversations with pictures (.jsonl) beside the text"
        )


def _with_other_pictures(train: Sequence[Sample], recipe: QuantRecipe) -> list[Sample]:
    """Return what tuning sees beside the training conversations; nothing where it does not run."""
    swaps = recipe.picture_swaps if recipe.tuning_steps else 0
    return calibration.show_other_pictures(train, swaps, recipe.seed)


def _check_lengths(samples: Sequence[Sample], limit: int) -> None:
    """Refuse what the model was never trained to read, before it is run."""
    for sample in samples:
        if len(sample.token_ids) > limit:
            raise CalibrationError(
                f"{sample.where}: {len(sample.token_ids)} tokens, pictures included, but the model "
                f"reads at most {limit}: shorten the conversation, or set --max-image-tokens"
            )
