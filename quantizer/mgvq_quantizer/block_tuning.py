"""Tuning of one decoder block after another, right after it is rounded (called by `stream`).

A block's tables, row scales, norms and biases are moved until it makes of what the quantized blocks
before it produce what the original model has there; codes stay. So errors are made up for where
they arise, and the next block is rounded on what the tuned one makes. Two hidden states of every
sample are held, the original model's and the quantized one's. The loss is the squared error
as a share of the output's energy, pictures and text apart: pictures are most of the tokens, and
their rows have another size. Tables that other blocks read too stay: `tuning` moves those.
Not here: what moves and which state is kept (`knobs`).

Source: method memo D.4(a); QuIP# (arXiv 2402.04396), section 5.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from mgvq_kernels.layout import VQWeight
from mgvq_quantizer.allocation import MatrixPlan
from mgvq_quantizer.batches import (
    MAX_TOKENS,
    Features,
    TokenBatch,
    deal,
    embed,
    make_batch,
    split_batches,
)
from mgvq_quantizer.calibration import Sample
from mgvq_quantizer.gradients import shows_picture
from mgvq_quantizer.knobs import MatrixKnobs, find_best
from mgvq_quantizer.recipe import QuantRecipe
from mgvq_quantizer.teacher import Values
from mgvq_quantizer.work_folder import WorkFolder
from mgvq_runtime.models.causal_lm import CausalLM

States = Mapping[int, Tensor]
"""`[T, D]` between two blocks: the hidden state of each sample, by its `id`."""


@dataclass(frozen=True, eq=False)
class BlockData:
    """What blocks are tuned on."""

    train: Sequence[Sample]
    heldout: Sequence[Sample]
    features: Features
    """Rows of every picture, from the quantized vision tower."""
    originals: States
    """What enters the decoder of the original model; `decoder_states` of it."""

    @property
    def samples(self) -> list[Sample]:
        """All of them."""
        return [*self.train, *self.heldout]


@dataclass(frozen=True)
class BlockTuned:
    """What tuning did to one block."""

    before: float
    after: float
    """Error of its outputs on held-out samples as a share of their energy, as stored."""
    step: int
    """The step that was kept; 0 if none was better than the untuned state."""


class BlockTuner:
    """Goes through the decoder beside `stream`, one block at a time."""

    def __init__(
        self,
        model: CausalLM,
        plans: Mapping[str, MatrixPlan],
        data: BlockData,
        recipe: QuantRecipe,
        work: WorkFolder,
        progress: Callable[[str], None],
    ) -> None:
        """Stand before the first block.

        Args:
            model: the one that is being quantized in place, up to the decoder.
            plans: every matrix.
            data: samples, and what the original model has before the first block.
            recipe: steps and step sizes.
            work: where tuned blocks are kept, and found again.
            progress: told what happens, in words.
        """
        self._model, self._plans, self._data = model, plans, data
        self._recipe, self._work, self._progress = recipe, work, progress
        self._originals = data.originals
        self._states = decoder_states(model, data.samples, data.features)

    def enter(self, block: nn.Module) -> None:
        """Take note of what a block makes in the original model, before it is quantized."""
        self._originals = self._through(block, self._originals)

    @torch.no_grad()
    def leave(
        self, prefix: str, block: nn.Module, weights: Mapping[str, VQWeight]
    ) -> tuple[dict[str, VQWeight], BlockTuned]:
        """Tune a block whose matrices are all rounded, or take it from the work folder.

        Args:
            prefix: the block's name.
            block: its matrices, norms and biases are replaced by tuned ones.
            weights: its quantized matrices by name.

        Returns:
            The tuned matrices, and what it was good for.
        """
        vectors = {
            f"{prefix}.{name}": parameter
            for name, parameter in block.named_parameters()
            if parameter.dim() == 1
        }
        mine = {name: self._plans[name] for name in weights}
        others = (plan for name, plan in self._plans.items() if plan.tails or name not in weights)
        elsewhere = {table for plan in others for band in plan.tables for table in band}
        knobs = MatrixKnobs(mine, weights, vectors, elsewhere)
        label = f"tuned.{prefix}"
        kept, facts = self._work.load_tensors(label), self._work.load_facts(label)
        if kept is None or facts is None:
            facts = asdict(self._tune(prefix, block, knobs))
            self._work.save_facts(label, facts)
            self._work.save_tensors(label, {str(i): t for i, t in enumerate(knobs.copy())})
        else:
            knobs.put([kept[0][str(i)] for i in range(len(kept[0]))])
        result = BlockTuned(**facts)
        tuned = dict(weights)
        if result.step:
            tuned, _ = knobs.stored()
            for name, value in _inside(prefix, knobs.stored_parameters()).items():
                block.get_parameter(name).copy_(value)
        self._states = self._through(block, self._states)
        return tuned, result

    def _tune(self, prefix: str, block: nn.Module, knobs: MatrixKnobs) -> BlockTuned:
        """Leave the knobs where the held-out samples liked them best."""
        weights = self._token_weights()
        steps = self._recipe.block_steps

        def error(samples: Sequence[Sample], parameters: Values) -> Tensor:
            batch = make_batch(samples, self._model.device)
            made = self._run(block, batch, self._states, _inside(prefix, parameters))
            target = _rows(self._originals, batch)
            return (made - target).square().sum(-1) * _rows(weights, batch)  # [T]

        @torch.no_grad()
        def measure() -> float:
            parameters = knobs.stored_parameters()
            parts = split_batches(self._data.heldout, MAX_TOKENS)
            return float(torch.cat([error(part, parameters) for part in parts]).double().mean())

        def loss(part: list[Sample]) -> Tensor:
            return error(part, knobs.parameters()).mean()

        def told(step: int, now: float) -> None:
            self._progress(f"tuning {prefix}, step {step}/{steps}, held-out error {now:.5f}")

        dealt = deal(self._data.train, steps, self._recipe.tuning_batch_tokens, self._recipe.seed)
        with torch.enable_grad():
            found = find_best(knobs, dealt, loss, measure, self._recipe, told)
        return BlockTuned(*found)

    def _token_weights(self) -> States:
        """How much a squared error counts at each token, `[T]` by sample.

        The mean over the training tokens is then the sum of each modality's error as a share of
        its energy, by the number of modalities.
        """
        token = self._model.config.image_token_id
        pictures = {id(s): shows_picture(s, token) for s in self._data.samples}
        shown = torch.cat([pictures[id(s)] for s in self._data.train])
        outputs = (self._originals[id(s)] for s in self._data.train)
        energy = torch.cat([rows.square().sum(-1).double().cpu() for rows in outputs])  # [T]
        sums = torch.stack([energy[~shown].sum(), energy[shown].sum()])  # [2]: text, pictures
        count = len(shown) / sums.count_nonzero().clamp_min(1)
        shares = torch.where(sums > 0, count / sums, torch.zeros_like(sums)).float()
        shares = shares.to(self._model.device)
        return {key: shares[is_picture.long()] for key, is_picture in pictures.items()}

    @torch.no_grad()
    def _through(self, block: nn.Module, states: States) -> States:
        """Every sample's state behind a block."""
        behind: dict[int, Tensor] = {}
        ordered = sorted(self._data.samples, key=lambda sample: len(sample.token_ids))
        for part in split_batches(ordered, MAX_TOKENS):
            batch = make_batch(part, self._model.device)
            behind.update(_by_sample(batch, self._run(block, batch, states, {})))
        return behind

    def _run(self, block: nn.Module, batch: TokenBatch, states: States, values: Values) -> Tensor:
        """A block's output `[T, D]`, some of its parameters being `values`."""
        cos, sin = self._model.model.rotary_emb(batch.forward.positions)  # [T, Dh] float32 each
        call = (None, _rows(states, batch), cos, sin, batch.forward)
        x, residual = torch.func.functional_call(block, values, call)
        return x + residual


@torch.no_grad()
def decoder_states(model: CausalLM, samples: Sequence[Sample], features: Features) -> States:
    """Return what enters a model's decoder, sample by sample.

    Args:
        model: its token table is read.
        samples: to be laid out.
        features: rows of every picture.
    """
    states: dict[int, Tensor] = {}
    for part in split_batches(samples, MAX_TOKENS):
        batch = make_batch(part, model.device)
        states.update(_by_sample(batch, embed(model, batch, features)))
    return states


def _by_sample(batch: TokenBatch, rows: Tensor) -> States:
    """Split rows `[T, ...]` of a batch."""
    parts = torch.split(rows, [len(sample.token_ids) for sample in batch.samples])
    return {id(sample): part for sample, part in zip(batch.samples, parts, strict=True)}


def _rows(states: States, batch: TokenBatch) -> Tensor:
    """`[T, ...]` of a batch, end to end."""
    return torch.cat([states[id(sample)] for sample in batch.samples])


def _inside(prefix: str, values: Values) -> Values:
    """Parameters by their names within a block."""
    return {name.removeprefix(f"{prefix}."): value for name, value in values.items()}
