"""How many bytes each stage of a run holds at its peak, counted from shapes (for `forecast`).

The model is held in float32 throughout, or its blocks one by one (`residence`); so are samples, the
pictures' rows and what the unquantized model said. On top comes the largest of what a stage makes
and drops. Bytes are those of the device
that computes; on a CPU the process itself is added by `forecast`. Not here: work (`stage_work`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from mgvq_kernels.trellis import GROUP_WEIGHTS, segments
from mgvq_quantizer.allocation import MatrixPlan, sharing_groups
from mgvq_quantizer.batches import MAX_TOKENS, picture_batches, split_batches, unique_pictures
from mgvq_quantizer.calibration import Sample
from mgvq_quantizer.first_tables import MAX_TRAINING_VECTORS
from mgvq_quantizer.planning import BACKWARD_TOKENS, first_answers
from mgvq_quantizer.residence import BLOCKS
from mgvq_quantizer.solver_work import entries
from mgvq_quantizer.stage_work import Looking, Reading, Stages
from mgvq_quantizer.teacher import LOGIT_ROWS
from mgvq_quantizer.witness import DRAWS
from mgvq_runtime.checkpoint.row_parts import HEAD, TABLE
from mgvq_runtime.checkpoint.writer import SHARD_BYTES
from mgvq_runtime.request import ImageInput

_INT, _FLOAT, _DOUBLE, _LONG = 4, 4, 8, 8
_LOGIT_COPIES = 6
"""Of `[A, V]` while two sets of logits are compared: products, logarithms, their exponential,
difference and product."""


class StageMemory:
    """Peak bytes of each stage; methods are named as those of `Stages`."""

    def __init__(self, stages: Stages, stored: tuple[int, int], by_block: bool = False) -> None:
        """Take the run.

        Args:
            stages: what it does.
            stored: of `preflight.stored_bytes`.
            by_block: whether a block's matrices are in memory only while it is used.
        """
        self.stages, self.by_block = stages, by_block
        self.solutions, self.checkpoint_bytes = stored[0], sum(stored)
        self.config, data = stages.graph.config, stages.data
        text = self.config.text_config
        self.D, self.V = text.hidden_size, text.vocab_size
        pictures = unique_pictures(data.all)
        everything = sum(parameter.numel() for parameter in stages.graph.parameters())
        blocks = self._blocks()
        self.copy = _FLOAT * max(blocks)
        self.block = self.copy if by_block else 0
        self.model = _FLOAT * (everything - (sum(blocks) if by_block else 0)) + self.block
        patches = sum(picture.patches.size for picture in pictures)
        self.features = _FLOAT * self.D * sum(picture.num_tokens for picture in pictures)
        said = Reading.of([*data.all, *data.drawn(stages.recipe)]).answers
        self.reference = _FLOAT * self.D * (said + self.V)
        ids = sum(len(sample.token_ids) for sample in [*data.all, *data.swapped])
        self.samples = _FLOAT * patches + 2 * 4 * _LONG * ids
        self.entered = _FLOAT * stages.train.tokens * 2 * (self.D + text.head_dim)
        """What enters one block: states, the stream beside them, rotations."""

    @property
    def held(self) -> int:
        """What every stage after the first holds."""
        return self.model + self.samples + self.features + self.reference

    def own_answers(self) -> int:
        """A forward over a batch of prompts, and keys and values of prompts and answers."""
        own, text = self.stages.data.own, self.config.text_config
        if not own:
            return 0
        longest = max(len(sample.token_ids) for sample in own)
        tokens = max(longest, min(MAX_TOKENS, Reading.of(own).tokens))
        kept = 2 * self.stages.layers * tokens * text.num_key_value_heads * text.head_dim
        logits = min(LOGIT_ROWS, len(own)) * self.V
        return self.held + self._read(own) + _FLOAT * (kept + logits)

    def ask_teacher(self) -> int:
        """The model, and the larger of a forward of the tower and one of the decoder."""
        return self.held + max(self._look(), self._read(self.stages.data.all))

    def squared_gradients(self) -> int:
        """A graph of one step's tokens in one block, and two numbers a token."""
        return self.held + self._weights() + self._backward(1)

    def survey(self) -> int:
        """What enters a block, the moments of its matrices three times over, one rounding; two
        blocks, as matrices are tried in front of those behind them."""
        inputs = [plan.layout.in_features for plan in self._decoder() if ".0." in plan.name]
        moments = 3 * _DOUBLE * sum(i * i for i in inputs)
        data = self.stages.data
        asked = first_answers(data)
        least = max(
            self._read([*data.train, *asked]) + self._logits(asked), self._solve(self._decoder())
        )
        return self.held + self.block + self._weights() + 2 * self.entered + moments + least

    def share_books(self) -> int:
        """The moments of all groups, and all matrices of one at once."""
        groups, moments = [], 0
        for group in sharing_groups(self.stages.plans).values():
            moment = _DOUBLE * group[0].layout.in_features ** 2
            dense = _FLOAT * group[0].layout.num_weights if self.by_block else 0
            groups.append(moment + sum(self._kept(plan) + dense for plan in group))
            moments += moment * len(group)
        read = max(self._look(), self._read(self.stages.data.train))
        return self.held + self._weights() + moments + max(read, max(groups, default=0))

    def vision(self) -> int:
        """What enters a block of the tower, and one rounding."""
        vision, shown = self.config.vision_config, self.stages.shown
        if vision is None:
            return 0
        entered = 2 * _FLOAT * shown.patches * vision.embed_dim
        plans = [p for n, p in self.stages.plans.items() if n.startswith("visual.")]
        rounded = entered + self._solve(plans)
        return self.held + self._weights() + max(rounded, self._look() + self.features)

    def embedding(self) -> int:
        """One rounding."""
        plans = [plan for name, plan in self.stages.plans.items() if name.startswith(TABLE)]
        return self.held + self._weights() + self.solutions + self._solve(plans)

    def decoder(self) -> int:
        """What enters a block and leaves it, and the larger of a forward and a rounding."""
        plans = [*self._decoder(), *(p for n, p in self.stages.plans.items() if n.startswith(HEAD))]
        least = max(self._read(self.stages.data.train), self._solve(plans))
        recipe = self.stages.recipe
        more = self._gate() if recipe.gated else 0
        more += self.entered + self.copy if recipe.mismatch else 0  # `OriginalBlocks`
        more += self._block_tuning() if recipe.block_steps else 0
        return self.held + self._weights() + self.solutions + 2 * self.entered + least + more

    def tune(self) -> int:
        """Every weight decoded with a graph behind it, and a graph of one step's tokens; without
        steps one look."""
        look = self._read(self.stages.data.heldout) + self._logits(self.stages.data.heldout)
        if not self.stages.recipe.tuning_steps:
            return self.held + self.solutions + look
        plans = [p for n, p in self.stages.plans.items() if not n.startswith("visual.")]
        weights = sum(plan.layout.num_weights for plan in plans)
        codes = sum(entries(plan.layout) for plan in plans)
        batch, tokens = self._longest(self.stages.recipe.tuning_batch_tokens)
        graph = self._graph(tokens, self.stages.layers) + self._all_logits(batch)
        decoded = _FLOAT * 4 * weights + _INT * codes
        return self.held + self.solutions + decoded + max(graph, look)

    def write(self) -> int:
        """What a file holds until it is closed."""
        return self.held + self.solutions + min(self.checkpoint_bytes, SHARD_BYTES)

    def _weights(self) -> int:
        """How much each token counts, by matrix, where gradients were asked for."""
        if not self.stages.weighed:
            return 0
        return 2 * _FLOAT * self.stages.train.tokens * len(self._decoder())

    def _gate(self) -> int:
        """Inputs and output gradients of a block's matrices, on both sets of samples; the block
        once more, or another that is looked at meanwhile."""
        sides = sum(
            sum(s) for n, s in self.stages.linears.items() if n.startswith("model.layers.0.")
        )
        tokens = 3 * self.stages.train.tokens + 6 * self.stages.heldout.tokens
        return _FLOAT * tokens * sides + self._backward(1 + DRAWS) + self.block

    def _backward(self, losses: int) -> int:
        """`backward.sides_of` of a batch: what enters every block, and one's graph."""
        batch, tokens = self._longest(BACKWARD_TOKENS)
        block = [s for n, s in self.stages.linears.items() if n.startswith("model.layers.0.")]
        sides = sum(i + losses * o for o, i in block)
        entered = 2 * self.D * (self.stages.layers + 1 + losses)
        graph = self._graph(tokens, 1) + _FLOAT * tokens * (entered + sides)
        return max(graph, _FLOAT * tokens * entered + self._all_logits(batch))

    def _block_tuning(self) -> int:
        """States of both models, and a block decoded with a graph behind it."""
        samples = Reading.of([*self.stages.data.train, *self.stages.data.heldout])
        states = 3 * _FLOAT * samples.tokens * self.D
        block = [plan for plan in self._decoder() if plan.name.startswith("model.layers.0.")]
        weights = sum(plan.layout.num_weights for plan in block)
        return (
            states
            + 4 * _FLOAT * weights
            + self._graph(self._longest(self.stages.recipe.tuning_batch_tokens)[1], 1)
        )

    def _solve(self, plans: Sequence[MatrixPlan]) -> int:
        """The largest rounding, with the moment that it is made from."""
        return max((self._kept(p) + _peak(p) for p in plans), default=0)

    def _kept(self, plan: MatrixPlan) -> int:
        """What the solver keeps of a matrix from round to round."""
        O, I = plan.layout.out_features, plan.layout.in_features  # noqa: E741
        codes = entries(plan.layout)
        square = 2 * _DOUBLE + 3 * _FLOAT  # the moment twice; damped, and both feedbacks
        return square * I * I + 3 * _FLOAT * O * I + 2 * _LONG * codes

    def _look(self) -> int:
        """A forward of the tower over one batch of pictures."""
        vision = self.config.vision_config
        pictures = unique_pictures(self.stages.data.all)
        if vision is None or not pictures:
            return 0
        largest = max(picture_batches(pictures), key=_patches)
        patches = Looking.of(largest).patches
        width = max(3 * vision.intermediate_size, 7 * vision.embed_dim)
        return _FLOAT * patches * (vision.patch_dim + 2 * vision.embed_dim + width)

    def _read(self, samples: Sequence[Sample]) -> int:
        """A forward of the decoder over the largest batch of samples."""
        ordered = sorted(samples, key=lambda sample: len(sample.token_ids))
        batches = split_batches(ordered, MAX_TOKENS)
        tokens = max(Reading.of(batch).tokens for batch in batches)
        return _FLOAT * tokens * self._widest()

    def _widest(self) -> int:
        """Numbers a token takes inside a block, at most."""
        text = self.config.text_config
        heads = (text.num_attention_heads + 2 * text.num_key_value_heads) * text.head_dim
        return 3 * self.D + max(3 * text.intermediate_size, 3 * heads)

    def _graph(self, tokens: int, blocks: int) -> int:
        """Everything a backward pass through some blocks needs of so many tokens."""
        text = self.config.text_config
        heads = (text.num_attention_heads + 2 * text.num_key_value_heads) * text.head_dim
        a_block = 6 * self.D + 4 * text.intermediate_size + 3 * heads
        return _FLOAT * tokens * blocks * a_block

    def _logits(self, samples: Sequence[Sample]) -> int:
        """Two sets of logits of the largest batch of samples, compared some rows at a time."""
        parts = split_batches(samples, MAX_TOKENS)
        answers = max(Reading.of(part).answers for part in parts)
        return _LOGIT_COPIES * _FLOAT * min(answers, LOGIT_ROWS) * self.V

    def _all_logits(self, samples: Sequence[Sample]) -> int:
        """The same of one batch, with a graph behind all rows."""
        return _LOGIT_COPIES * _FLOAT * Reading.of(samples).answers * self.V

    def _blocks(self) -> list[int]:
        """Weights of the matrices of each block of decoder and tower."""
        found: Counter[str] = Counter()
        for name, parameter in self.stages.graph.named_parameters():
            for prefix in BLOCKS:
                if name.startswith(f"{prefix}.") and parameter.dim() > 1:
                    found[name[: name.index(".", len(prefix) + 1)]] += parameter.numel()
        return list(found.values())

    def _longest(self, most: int) -> tuple[list[Sample], int]:
        """The samples of the longest batch of `most` tokens, and their tokens."""
        parts = split_batches(self.stages.data.train, most)
        longest = max(parts, key=lambda part: Reading.of(part).tokens)
        return longest, Reading.of(longest).tokens

    def _decoder(self) -> list[MatrixPlan]:
        return [plan for name, plan in self.stages.plans.items() if _in_decoder(name)]


def _peak(plan: MatrixPlan) -> int:
    """What a rounding makes and drops: while factoring, or while refitting and searching."""
    O, I = plan.layout.out_features, plan.layout.in_features  # noqa: E741
    factoring = 5 * _DOUBLE * I * I
    codes = _LONG * entries(plan.layout)
    refitting = 5 * _FLOAT * O * I + codes
    if plan.layout.codec == "trellis":
        return max(factoring, refitting, 2 * _FLOAT * O * I + codes + _paths(plan))
    longest = max(stage.vector_dim for band in plan.layout.bands for stage in band.stages)
    training = 6 * _DOUBLE * MAX_TRAINING_VECTORS * longest
    return max(factoring, refitting, training)


def _paths(plan: MatrixPlan) -> int:
    """What every thread notes of a segment's paths: for every weight, where each came from."""
    lengths = [end - start for start, end in segments(plan.layout.out_features)]
    states = max(s.codebook_size >> s.rate for band in plan.layout.bands for s in band.stages)
    threads = min(torch.get_num_threads(), len(lengths))
    return threads * max(lengths) * GROUP_WEIGHTS * states


def _in_decoder(name: str) -> bool:
    return name.startswith("model.layers.")


def _patches(pictures: Sequence[ImageInput]) -> int:
    return Looking.of(pictures).patches
