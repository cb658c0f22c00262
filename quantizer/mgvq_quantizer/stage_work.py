"""How much each stage of a run has to do, counted from shapes (called by `forecast`).

`Stages` has a method for each stage of `pipeline`, named after the function that it counts
(`teacher.ask_teacher`, `survey.survey`, `Stream.vision`, ...; `own_answers` after its file):
whoever changes one changes the other; `tests/quantizer/test_forecast.py` runs both. Rounding itself
is counted in `solver_work`.
Not here: seconds (`machine_speed`), bytes (`stage_memory`), where the data come from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from mgvq_quantizer import solver_work as work
from mgvq_quantizer.allocation import MatrixPlan, sharing_groups
from mgvq_quantizer.batches import deal, evenly, unique_pictures
from mgvq_quantizer.calibration import Sample
from mgvq_quantizer.dataset import Data
from mgvq_quantizer.gate_work import Asked, choose
from mgvq_quantizer.knobs import CHECKS
from mgvq_quantizer.ordering import quick
from mgvq_quantizer.original_blocks import ADDERS
from mgvq_quantizer.own_answers import count_reading
from mgvq_quantizer.planning import first_answers
from mgvq_quantizer.recipe import QuantRecipe
from mgvq_quantizer.solver_work import FACTOR, FLOW, FORWARD, REFIT, Work, times, total
from mgvq_quantizer.witness import DRAWS
from mgvq_runtime.checkpoint.bits import group_of
from mgvq_runtime.checkpoint.row_parts import HEAD, TABLE
from mgvq_runtime.models.causal_lm import CausalLM
from mgvq_runtime.request import ImageInput

_ATTENTION_BACKWARD = 2.5
"""Products of attention's backward pass to those of its forward: 5 for 2, as it computes the scores
again."""


@dataclass(frozen=True)
class Reading:
    """What the decoder reads: some samples."""

    tokens: int
    squares: int
    """Sum of the squared lengths: pairs that attention looks at."""
    answers: int
    samples: int

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Reading:
        """Measure samples."""
        lengths = [len(sample.token_ids) for sample in samples]
        answers = sum(int(sample.is_answer.sum()) for sample in samples)
        return cls(sum(lengths), sum(n * n for n in lengths), answers, len(lengths))


@dataclass(frozen=True)
class Looking:
    """What the vision tower sees: some pictures."""

    patches: int
    squares: int

    @classmethod
    def of(cls, pictures: Iterable[ImageInput]) -> Looking:
        """Measure pictures; a tile's class token is left out."""
        grids = [picture.grid_thw for picture in pictures]
        return cls(sum(t * h * w for t, h, w in grids), sum(t * (h * w) ** 2 for t, h, w in grids))


class Stages:
    """The stages of one run."""

    def __init__(
        self, graph: CausalLM, plans: Mapping[str, MatrixPlan], recipe: QuantRecipe, data: Data
    ) -> None:
        """Take what a run would.

        Args:
            graph: of any device, the meta device too; only shapes are looked at.
            plans: every matrix, in the layouts it is expected to get.
            recipe: settings.
            data: calibration samples.
        """
        self.graph, self.plans, self.recipe, self.data = graph, plans, recipe, data
        self.linears = {
            name: (module.weight.shape[0], module.weight.shape[1])
            for name, module in graph.named_modules()
            if isinstance(module, nn.Linear)
        }
        text = graph.config.text_config
        self.head = text.vocab_size * text.hidden_size
        self.layers = text.num_hidden_layers
        named = [name for name in plans if group_of(name) == "decoder"]
        self.surveyed = bool(named) and recipe.allocation != "uniform"
        wanted = recipe.guided or recipe.channel_classes
        self.weighed = self.surveyed or (bool(named) and wanted)
        self.pictures = unique_pictures(data.train)
        self.shown = Looking.of(evenly(self.pictures, recipe.max_pictures))
        self.train, self.heldout = Reading.of(data.train), Reading.of(data.heldout)

    def own_answers(self) -> Work:
        """Count `own_answers.answer_open_questions`: prompts once, then token after token."""
        if not self.data.own:
            return Work()
        read = Reading(*count_reading(self.data.own))
        return total([self.decoder_forward(read), Work({FORWARD: read.answers * self.head})])

    def ask_teacher(self) -> Work:
        """Count `encode_pictures` and `teacher.ask_teacher`, over all samples that are used."""
        asked = Reading.of([*self.data.all, *self.data.drawn(self.recipe)])
        return total([self.encode_pictures(), self.decoder_forward(asked)])

    def squared_gradients(self) -> Work:
        """Count `gradients.squared_gradients`: every block runs forward twice, and no weight has a
        gradient of its own."""
        if not self.weighed:
            return Work()
        forwards = 3 if self.recipe.channel_classes else 2  # one more: `channel_classes`
        head = Work({FORWARD: 2 * self.train.answers * self.head})
        forward = times(self.decoder_forward(self.train), forwards)
        return total([forward, self.decoder_backward(self.train), head])

    def survey(self) -> Work:
        """Count `survey.survey`: every block once, each matrix on trial, from its block on."""
        if not self.surveyed:
            return Work()
        reading = Reading.of(first_answers(self.data))
        tries = self.recipe.rates.index(self.recipe.reference_rate) + 1
        parts, behind = [], self._head(reading)
        for i in reversed(range(self.layers)):
            block = self.decoder_block(i, reading)
            behind = total([block, behind])
            names = self._planned(f"model.layers.{i}.")
            parts += [self.decoder_block(i, self.train), block]
            for name in names:
                parts += [self._moment(name, self.train.tokens, 2), self._measure(name)]
                parts.append(times(behind, tries))
        return total(parts)

    def share_books(self) -> Work:
        """Count `Stream.share_books`: one pass of tower or decoder, then each table group."""
        groups, parts = sharing_groups(self.plans).values(), []
        for is_seen in {group[0].name.startswith("visual.") for group in groups}:
            parts.append(self.encode(self.shown) if is_seen else self.decoder_forward(self.train))
        for group in groups:
            for matrix in group:
                parts.append(self._moment(matrix.name, self._rows(matrix.name), 1))
                parts.append(work.channel_order(matrix.layout, self.recipe))
            layouts = [matrix.layout for matrix in group]
            parts.append(work.solve(layouts, self.recipe, is_trial=True))
        return total(parts)

    def vision(self) -> Work:
        """Count `Stream.vision` and the second `encode_pictures`."""
        if self.graph.visual is None:
            return Work()
        if not self._planned("visual."):
            return self.encode_pictures()
        shown, patch = self.shown, "visual.patch_embed.proj"
        parts = [self._products([patch], shown.patches), self._matrix(patch)]
        for i in range(len(self.graph.visual.blocks)):
            prefix = f"visual.blocks.{i}."
            attention = self._vision_attention(shown)
            parts += self._block(prefix, shown.patches, attention)
        parts += self._block("visual.merger.", self._rows("visual.merger."), Work(), is_last=True)
        return total([*parts, self.encode_pictures()])

    def embedding(self) -> Work:
        """Count `Stream.embedding` with `tied_table.tied_moment`, and `measured_use` of parts."""
        names = self._planned(TABLE)
        if not names:
            return Work()
        said, asked = Reading.of(self.data.all).answers, Work()
        measured = Work({FORWARD: said * self.head * self.recipe.has_row_parts})
        if self.graph.config.tie_word_embeddings:
            head = (said + 3 * self.heldout.answers) * self.head
            moment = said * self.graph.config.text_config.hidden_size**2
            forwards = times(self.decoder_forward(self.heldout), 2)
            asked = total([forwards, Work({FORWARD: head + moment})])
        return total([measured, asked, *map(self._round, names)])

    def decoder(self) -> Work:
        """Count `Stream.decoder`; `Witness.enter`, `gate.choose` and `BlockTuner` where the recipe
        asks."""
        parts = []
        for i in range(self.layers):
            attention = self._attention(self.train)
            parts += self._block(f"model.layers.{i}.", self.train.tokens, attention)
            if self.recipe.mismatch:
                parts += self._original_blocks(i)
            if self.recipe.gated:
                parts += [self._witness(i), self._gate(i)]
            if self.recipe.block_steps:
                parts.append(self._tune_block(i))
        if heads := self._planned(HEAD):
            parts += [self.decoder_forward(self.train), self._matrix(heads[0])]
            parts += map(self._round, heads[1:])
        return total(parts)

    def tune(self) -> Work:
        """Count `tuning.tune`: weights have gradients, and are decoded for every step; without
        steps one look at the held-out samples."""
        batches = self.data.tuning_batches(self.recipe)
        look = total([self.decoder_forward(self.heldout), self._head(self.heldout)])
        if not batches:
            return look
        shown = Reading.of([sample for batch in batches for sample in batch])
        head = Work({FORWARD: 4 * shown.answers * self.head})
        read = total([self.decoder_forward(shown), self.decoder_backward(shown, True), head])
        tuned = [p for name, p in self.plans.items() if not name.startswith("visual.")]
        return self._find_best(len(batches), read, look, tuned)

    def encode_pictures(self) -> Work:
        """Count one look of the tower at every picture."""
        if self.graph.visual is None:
            return Work()
        return self.encode(Looking.of(unique_pictures(self.data.all)))

    def encode(self, looking: Looking) -> Work:
        """Count the vision tower with its merger."""
        assert self.graph.visual is not None, "a model without a tower sees no picture"
        tower = [name for name in self.linears if name.startswith("visual.")]
        merger = [name for name in tower if name.startswith("visual.merger.")]
        depth = len(self.graph.visual.blocks)
        return total(
            [
                self._products([n for n in tower if n not in merger], looking.patches),
                self._products(merger, self._merged(looking.patches)),
                times(self._vision_attention(looking), depth),
            ]
        )

    def decoder_forward(self, reading: Reading) -> Work:
        """Count all blocks, without the head."""
        return total([self.decoder_block(i, reading) for i in range(self.layers)])

    def decoder_backward(self, reading: Reading, has_weights: bool = False) -> Work:
        """Count the gradients of all blocks; of weights too where they have some."""
        blocks = [self._block_backward(i, reading, has_weights) for i in range(self.layers)]
        return total(blocks)

    def decoder_block(self, i: int, reading: Reading) -> Work:
        """Count one block of the decoder."""
        names = self._all(f"model.layers.{i}.")
        return total([self._products(names, reading.tokens), self._attention(reading)])

    def _block_backward(self, i: int, reading: Reading, has_weights: bool = False) -> Work:
        prefix = f"model.layers.{i}."
        parts = [self._products(self._all(prefix), reading.tokens)]
        if has_weights:
            parts.append(self._products(self._planned(prefix), reading.tokens))
        return total([*parts, self._attention_backward(reading)])

    def _head(self, reading: Reading) -> Work:
        """`teacher.state_divergences`: the model's logits and the reference's."""
        return Work({FORWARD: 2 * reading.answers * self.head})

    def _find_best(self, steps: int, read: Work, look: Work, tuned: Sequence[MatrixPlan]) -> Work:
        """`knobs.find_best` and `MatrixKnobs`.

        Args:
            steps: at least 1.
            read: forward and backward over the batches of all steps.
            look: at the held-out samples.
            tuned: plans of the matrices that are decoded.
        """
        every = max(1, steps // CHECKS)
        looks = 1 + steps // every + (steps % every > 0)
        weights = sum(plan.layout.num_weights for plan in tuned)
        codes = sum(work.entries(plan.layout) for plan in tuned)
        decoded = Work({REFIT: steps * codes + looks * codes // 2, FLOW: steps * 8 * weights})
        return total([read, decoded, times(look, looks)])

    def _tune_block(self, i: int) -> Work:
        """`BlockTuner.enter` and `leave`: all samples through the block before and after."""
        recipe, steps = self.recipe, self.recipe.block_steps
        both = total([self.decoder_block(i, r) for r in (self.train, self.heldout)])
        dealt = deal(self.data.train, steps, recipe.tuning_batch_tokens, recipe.seed)
        shown = Reading.of([sample for batch in dealt for sample in batch])
        read = total([self.decoder_block(i, shown), self._block_backward(i, shown, True)])
        names = self._planned(f"model.layers.{i}.")
        tuned = [self.plans[name] for name in names]
        look = self.decoder_block(i, self.heldout)
        return total([times(both, 2), self._find_best(steps, read, look, tuned)])

    def _measure(self, name: str) -> Work:
        """`sensitivity.measure`: the whole matrix up to the reference, some rows at other rates."""
        layout = self.plans[name].layout
        few = work.some_rows(layout)
        recipe, parts = quick(self.recipe), [times(work.factorize(few), 2)]
        for rate in self.recipe.rates:
            tried = layout if rate <= self.recipe.reference_rate else few
            one = work.uniform(tried, rate, recipe)
            residual = few.out_features * layout.in_features**2
            parts += [work.solve([one], recipe, is_trial=True), Work({FACTOR: 2 * residual})]
        return total(parts)

    def _block(self, prefix: str, rows: int, attention: Work, is_last: bool = False) -> list[Work]:
        """Every matrix of a block: what comes before it, its moment, its rounding; then all."""
        names, parts = self._all(prefix), []
        for j, name in enumerate(names):
            if name in self.plans:
                before = [self._products(names[:j], rows)] + [attention] * (j > 0)
                parts += [times(total(before), self._looks(name)), self._matrix(name)]
        return parts if is_last else [*parts, self._products(names, rows), attention]

    def _matrix(self, name: str) -> Work:
        """`Stream._matrix`, without what runs before the matrix."""
        if name not in self.plans:
            return Work()
        return total([self._moment(name, self._rows(name), 1), self._round(name)])

    def _looks(self, name: str) -> int:
        """How often `Stream._matrix` runs up to a matrix: for its moment, and for its bias."""
        bias = self.graph.get_submodule(name).bias
        return 2 if self.recipe.bias_correction and bias is not None else 1

    def _round(self, name: str) -> Work:
        """`Stream._problem` and `Stream._solve`, in the plain way."""
        plan = self.plans[name]
        order = work.channel_order(plan.layout, self.recipe)
        return total([order, work.solve([plan.layout], self.recipe, plan.shared)])

    def _witness(self, i: int) -> Work:
        """`Witness.enter`: gradients of half the model on both sets."""
        parts = []
        asked = ((self.train, 1), (self.heldout, DRAWS))
        for reading, draws in asked if self._planned(f"model.layers.{i}.") else ():
            head = Work({FORWARD: (3 + draws) * reading.answers * self.head})
            parts += [self.decoder_forward(reading), head]
            for j in range(i, self.layers):
                back = times(self._block_backward(j, reading), 1 + draws)
                parts += [self.decoder_block(j, reading), back]
        return total(parts)

    def _gate(self, i: int) -> Work:
        """`Witness.about` and `gate.choose` of a block, without the plain rounding."""
        tokens = self.heldout.tokens
        asked = Asked(self.train.tokens, self.train.squares, DRAWS * tokens)
        plans = [self.plans[name] for name in self._planned(f"model.layers.{i}.")]
        return total([choose(plan, self.recipe, asked, tokens) for plan in plans])

    def _original_blocks(self, i: int) -> list[Work]:
        """`OriginalBlocks` of a block, and `shift.mismatch_shift`."""
        names, tokens = self._all(f"model.layers.{i}."), self.train.tokens
        parts = [self.decoder_block(i, self.train)]
        for name in self._planned(f"model.layers.{i}."):
            j, (O, I), adds = names.index(name), self.linears[name], name.endswith(ADDERS)  # noqa: E741
            before = [self._products(names[:j], tokens)] + [self._attention(self.train)] * (j > 0)
            crossed, solved = tokens * I * (I + O * adds), 2 * O * I * I + I**3 // 3
            parts += [*before, Work({FORWARD: crossed, FACTOR: solved})]
        return parts

    def _moment(self, name: str, rows: int, count: int) -> Work:
        """`statistics._Moment.add` over all runs."""
        return Work({FORWARD: count * rows * self.plans[name].layout.in_features ** 2})

    def _products(self, names: Sequence[str], rows: int) -> Work:
        """Linear layers, and the pointwise layers around them."""
        shapes = [self.linears[name] for name in names]
        weights, sides = sum(o * i for o, i in shapes), sum(o + i for o, i in shapes)
        return Work({FORWARD: rows * weights, FLOW: rows * sides})

    def _attention(self, reading: Reading) -> Work:
        text = self.graph.config.text_config
        return Work({FORWARD: 2 * text.num_attention_heads * text.head_dim * reading.squares})

    def _attention_backward(self, reading: Reading) -> Work:
        return Work({FORWARD: int(_ATTENTION_BACKWARD * self._attention(reading)[FORWARD])})

    def _vision_attention(self, looking: Looking) -> Work:
        vision = self.graph.config.vision_config
        assert vision is not None, "a model without a tower sees no picture"
        return Work({FORWARD: 2 * vision.embed_dim * looking.squares})

    def _merged(self, patches: int) -> int:
        """Rows of the merger's first matrix: patches side by side."""
        vision = self.graph.config.vision_config
        first = next(shape for n, shape in self.linears.items() if n.startswith("visual.merger."))
        assert vision is not None, "a model without a tower sees no picture"
        return patches * vision.embed_dim // first[1]

    def _rows(self, name: str) -> int:
        """Rows of calibration data that enter a matrix while it is rounded."""
        if name.startswith(HEAD):
            return self.train.answers
        if group_of(name) == "projector":
            return self._merged(self.shown.patches)
        return self.shown.patches if name.startswith("visual.") else self.train.tokens

    def _all(self, prefix: str) -> list[str]:
        return [name for name in self.linears if name.startswith(prefix)]

    def _planned(self, prefix: str) -> list[str]:
        return [name for name in self.plans if name.startswith(prefix)]
