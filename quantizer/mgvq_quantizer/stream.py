"""Matrix after matrix through the model, each on what the quantized ones before it produce.

Called by `pipeline`. Activations are kept in front of one block at a time; every linear of it
sees its inputs through the already quantized linears of the same block. After a matrix is done its
dense weight is replaced by the decoded one, so that model, calibration and checkpoint agree.
Matrices of the decoder may be rounded in several ways, of which `gate` keeps one.
A decoder block may be tuned (`block_tuning`) before the next one sees what it makes.
Not here: data, files, end-to-end tuning.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial

import torch
from torch import Tensor, nn

from mgvq_kernels import ops
from mgvq_quantizer.allocation import MatrixPlan, sharing_groups
from mgvq_quantizer.batches import Features, TokenBatch, decoder_runs, encode_batch
from mgvq_quantizer.bias_correction import mean_error
from mgvq_quantizer.block_tuning import BlockTuned, BlockTuner
from mgvq_quantizer.codebook import Codebook
from mgvq_quantizer.gate import MatrixEvidence, Verdict, choose
from mgvq_quantizer.gradients import TokenWeights, weights_of
from mgvq_quantizer.ldl import damp, without_dead_inputs
from mgvq_quantizer.ordering import channel_order
from mgvq_quantizer.original_blocks import Missing, OriginalBlocks
from mgvq_quantizer.recipe import QuantRecipe
from mgvq_quantizer.rounding import kept_shares
from mgvq_quantizer.shared_books import books_of, keep_books, kept_books
from mgvq_quantizer.shift import mismatch_shift
from mgvq_quantizer.solver import Problem, Solution, solve
from mgvq_quantizer.statistics import (
    Calls,
    Run,
    input_mean,
    input_moment,
    input_moments,
    record_calls,
    rounding_of,
)
from mgvq_quantizer.teacher import Reference
from mgvq_quantizer.tied_table import tied_moment
from mgvq_quantizer.trellis_search import first_table, tails_of
from mgvq_quantizer.walk import walk_blocks
from mgvq_quantizer.witness import Testimony, Witness
from mgvq_quantizer.work_folder import WorkFolder
from mgvq_runtime.checkpoint.row_parts import HEAD, TABLE
from mgvq_runtime.models.causal_lm import CausalLM
from mgvq_runtime.request import ImageInput


class Stream:
    """Quantizes a model in place, in the order in which data flows through it."""

    def __init__(
        self,
        model: CausalLM,
        plans: Mapping[str, MatrixPlan],
        recipe: QuantRecipe,
        work: WorkFolder,
        progress: Callable[[str, Solution], None],
        token_weights: TokenWeights | None = None,
    ) -> None:
        """Take a dense model.

        Args:
            model: filled, dense and finite; its weights are replaced one by one.
            plans: what to do with each matrix; `plans` of the stream are these, with the tails
                that matrices chose once they are done.
            recipe: how.
            work: where finished matrices are kept, and found again.
            progress: told of each finished matrix.
            token_weights: how much each token counts for a matrix; those left out count all alike.
        """
        self.model, self.plans, self.recipe = model, dict(plans), recipe
        self.work, self.progress = work, progress
        self.token_weights = token_weights or {}
        self.books: dict[str, Codebook] = {}
        self.solutions: dict[str, Solution] = {}
        self.verdicts: dict[str, Verdict] = {}
        self.tuned_blocks: dict[str, BlockTuned] = {}

    def share_books(
        self,
        pictures: Sequence[Sequence[ImageInput]],
        batches: Sequence[TokenBatch],
        features: Features,
        device: torch.device,
        show: Callable[[str], None],
    ) -> None:
        """Train the tables that several matrices share, on the dense model, or find them kept.

        Args:
            pictures: batches for the vision tower.
            batches: samples for the decoder.
            features: rows of every picture.
            device: where to compute.
            show: told of each group of matrices whose tables are about to be trained.
        """
        groups = sharing_groups(self.plans)
        for label in [*groups]:
            if (kept := kept_books(self.work, label, device)) is not None:
                self.books |= kept
                groups.pop(label)
        modules = {m.name: self._module(m.name) for group in groups.values() for m in group}
        tower = {name: module for name, module in modules.items() if name.startswith("visual.")}
        blocks = {name: module for name, module in modules.items() if name not in tower}
        moments: dict[str, Tensor] = {}
        if tower:
            looking = [partial(encode_batch, self.model, part, device) for part in pictures]
            moments |= input_moments(tower, looking)
        if blocks:
            weights = {name: w for name in blocks if (w := self._weights(name, batches))}
            moments |= input_moments(blocks, decoder_runs(self.model, batches, features), weights)
        for label, group in groups.items():
            show(f"tables of {label}")
            own = {matrix.name: moments.pop(matrix.name) for matrix in group}
            with rounding_of(label):
                problems = list(self._problems(group, own))
                drawn = seeded(self.recipe.seed, label)
                solved = solve(problems, self.recipe, drawn, is_trial=True)
            books: dict[str, Codebook] = {}
            for problem, solution in zip(problems, solved, strict=True):
                books |= books_of(problem, solution)
            keep_books(self.work, label, books)
            self.books |= books

    def vision(self, batches: Sequence[Sequence[ImageInput]], device: torch.device) -> None:
        """Quantize the vision tower and the merger on batches of pictures."""
        tower = self.model.visual
        assert tower is not None, "a model without a vision tower has no pictures to run"
        runs: list[Run] = [partial(encode_batch, self.model, batch, device) for batch in batches]
        self._matrix("visual.patch_embed.proj", runs)
        calls = self._blocks("visual.blocks", tower.blocks, record_calls(tower.blocks[0], runs))
        ends: list[Run] = [partial(tower.merger, call[0]) for call in calls]
        for name in self._linears("visual.merger"):
            self._matrix(name, ends)

    def embedding(
        self, reference: Reference, asked: Sequence[TokenBatch], features: Features
    ) -> None:
        """Quantize the token table, whole or part by part.

        A tied table is also the output head: it then answers for both uses (`tied_table`).

        Args:
            reference: what the unquantized model says about all samples.
            asked: samples on which both uses are weighed.
            features: rows of every picture.
        """
        names = self._whole_or_parts(TABLE)
        moment = None
        if not all(self.work.holds(name) for name in names):
            width, device = self.model.config.text_config.hidden_size, self.model.device
            moment = torch.eye(width, dtype=torch.float64, device=device)
            if self.model.config.tie_word_embeddings:
                drawn = seeded(self.recipe.seed, f"noise of {TABLE}")
                moment = tied_moment(self.model, reference, asked, features, drawn)
        for name in names:
            self._matrix(name, moment=moment)

    def decoder(
        self,
        batches: Sequence[TokenBatch],
        features: Features,
        testimony: Testimony | None = None,
        tuner: BlockTuner | None = None,
        originals: OriginalBlocks | None = None,
    ) -> None:
        """Quantize the decoder's blocks, and the head if it is a matrix of its own.

        Args:
            batches: calibration samples.
            features: rows of every picture.
            testimony: what the gate asks about; None rounds every matrix in the plain way.
            tuner: tunes each block once it is rounded; None leaves them as rounded.
            originals: what entered the first block of the original model; None takes every matrix's
                inputs for what they should be.
        """
        decoder = self.model.model
        runs = decoder_runs(self.model, batches, features)
        calls = record_calls(decoder.layers[0], runs)
        witness = None if testimony is None else Witness(self.model, testimony)
        self._blocks("model.layers", decoder.layers, calls, batches, witness, tuner, originals)
        if heads := self._whole_or_parts(HEAD):
            rows = [run()[batch.answer_rows] for run, batch in zip(runs, batches, strict=True)]
            ends: list[Run] = [partial(self.model.logits, hidden) for hidden in rows]
            moment = None  # the same for all parts: every one reads the same states
            if not all(self.work.holds(name) for name in heads):
                moment = input_moment(heads[0], self._module(heads[0]), ends)
            for name in heads:
                self._matrix(name, ends, moment)

    def _blocks(
        self,
        prefix: str,
        blocks: nn.ModuleList,
        calls: Calls,
        batches: Sequence[TokenBatch] = (),
        witness: Witness | None = None,
        tuner: BlockTuner | None = None,
        originals: OriginalBlocks | None = None,
    ) -> Calls:
        """Quantize block after block; return the calls that would enter one more."""

        def visit(i: int, runs: Sequence[Run]) -> None:
            block = f"{prefix}.{i}"
            names = self._linears(block)
            if witness is not None:
                unsolved = [name for name in names if not self.work.holds(name)]
                witness.enter(unsolved, seeded(self.recipe.seed, f"labels of {block}"))
            if originals is not None:
                originals.enter(block, blocks[i])
            if tuner is not None:
                tuner.enter(blocks[i])
            for name in names:
                weights = self._weights(name, batches)
                self._matrix(name, runs, None, weights, witness, originals)
            if tuner is not None:
                rounded = {name: self.solutions[name].weight for name in names}
                tuned, self.tuned_blocks[block] = tuner.leave(block, blocks[i], rounded)
                for name, weight in tuned.items():
                    self.solutions[name] = replace(self.solutions[name], weight=weight)

        return walk_blocks(blocks, calls, visit)

    def _matrix(
        self,
        name: str,
        runs: Sequence[Run] = (),
        moment: Tensor | None = None,
        weights: Sequence[Tensor] | None = None,
        witness: Witness | None = None,
        originals: OriginalBlocks | None = None,
    ) -> None:
        """Quantize one matrix, or take it from the work folder, and put it into the model."""
        plan = self.plans.get(name)
        if plan is None:
            return
        module = self._module(name)
        solution = self.work.load(name, plan.layout)
        if solution is None:
            missing = None
            if originals is not None:
                moment, missing = originals.look(name, runs, weights)
            elif moment is None:
                moment = input_moment(name, module, runs, weights)
            evidence = None if witness is None else witness.about(name)
            with rounding_of(name):
                solution, target = self._solve(plan, moment, missing, evidence)
            if self.recipe.bias_correction and isinstance(module, nn.Linear):
                solution = replace(solution, bias=self._bias(name, target, solution, runs, weights))
            self.work.save(name, solution)
        if witness is not None:
            facts = self.work.load_facts(f"gate.{name}")
            assert facts is not None, "a verdict is written before its solution"
            self.verdicts[name] = Verdict(**facts)
        self.plans[name] = replace(plan, tails=solution.tails)
        weight = solution.weight.to(module.weight.device)
        module.weight.copy_(ops.vq_dequantize(weight))
        if solution.bias is not None and isinstance(module.bias, Tensor):
            module.bias.copy_(solution.bias)
        self.solutions[name] = replace(solution, weight=weight)
        self.progress(name, solution)

    def _solve(
        self,
        plan: MatrixPlan,
        moment: Tensor,
        missing: Missing | None,
        evidence: MatrixEvidence | None,
    ) -> tuple[Solution, Tensor]:
        """Quantize one matrix; with evidence in several ways, keeping the gate's verdict.

        Returns:
            The solution, and the weight `[O, I]` that it stands in for.
        """
        problem = self._problem(plan, moment)
        if plan.chooses_tails:
            tails = tails_of(problem.weight, moment, problem.permutation, plan.layout)
            plan = replace(plan, tails=tails)
            problem = replace(problem, tables=plan.tables)
        books = self._shared_books(plan) if plan.shared else None

        def solve_one(problem: Problem) -> Solution:
            drawn = seeded(self.recipe.seed, plan.name)
            solution = solve([problem], self.recipe, drawn, books)[0]
            return replace(solution, tails=plan.tails)

        original = problem.weight
        if missing is not None:
            A = damp(problem.hessian, self.recipe.damping)
            problem = problem.moved(mismatch_shift(original, missing, A, self.recipe.mismatch))
        if evidence is None:
            return solve_one(problem), problem.weight
        solution, verdict = choose(original, problem, evidence, self.recipe, solve_one)
        self.work.save_facts(f"gate.{plan.name}", asdict(verdict))
        return solution, problem.weight

    def _shared_books(self, plan: MatrixPlan) -> dict[str, Codebook]:
        """Return the tables of a matrix that others read too; those of a trellis stay untrained."""
        if plan.layout.codec == "lookup":
            return {name: self.books[name] for band in plan.tables for name in band}
        shares = kept_shares(plan.layout, self.recipe.drawn_out)
        bands = plan.tables, plan.layout.bands, plan.tails, shares
        return {
            name: first_table(
                stage.rate, stage.window, tail, seeded(self.recipe.seed, name)
            ).drawn_out(1 / kept)
            for (name,), band, tail, kept in zip(*bands, strict=True)
            for stage in band.stages
        }

    def _bias(
        self,
        name: str,
        target: Tensor,
        solution: Solution,
        runs: Sequence[Run],
        weights: Sequence[Tensor] | None,
    ) -> Tensor | None:
        """A layer's bias with the mean error of its rounded matrix in it; None if it has none."""
        module = self._module(name)
        if not isinstance(module.bias, Tensor):
            return None
        decoded = ops.vq_dequantize(solution.weight.to(module.weight.device))
        error = mean_error(target, decoded, input_mean(name, module, runs, weights))
        return (module.bias + error).half().float()

    def _weights(self, name: str, batches: Sequence[TokenBatch]) -> list[Tensor] | None:
        """How much each row of each batch counts for a matrix; None if all count alike."""
        weights = self.token_weights.get(name)
        return None if weights is None else weights_of(batches, weights)

    def _whole_or_parts(self, whole: str) -> list[str]:
        """Names of the planned matrices that a table or head is made of."""
        return [name for name in self.plans if name == whole or name.startswith(f"{whole}.")]

    def _linears(self, prefix: str) -> list[str]:
        """Names of the planned matrices under a module, in the order data flows."""
        return [name for name in self.plans if name.startswith(f"{prefix}.")]

    def _module(self, name: str) -> nn.Linear | nn.Embedding:
        module = self.model.get_submodule(name)
        assert isinstance(module, nn.Linear | nn.Embedding)
        return module

    def _problems(
        self, group: Sequence[MatrixPlan], moments: Mapping[str, Tensor]
    ) -> Iterator[Problem]:
        """Yield the problems of matrices of several blocks, in the order of the blocks."""
        tower = self.model.visual
        lists = {"model.layers": self.model.model.layers}
        if tower is not None:
            lists["visual.blocks"] = tower.blocks
        for prefix, blocks in lists.items():
            for i, _ in enumerate(blocks):
                for matrix in group:
                    if matrix.name.startswith(f"{prefix}.{i}."):
                        yield self._problem(matrix, moments[matrix.name])

    def _problem(self, plan: MatrixPlan, moment: Tensor) -> Problem:
        weight = without_dead_inputs(self._module(plan.name).weight, moment)
        order = None
        if plan.layout.has_permutation:
            generator = seeded(self.recipe.seed, f"order of {plan.name}")
            order = channel_order(
                weight, moment, plan.layout, self.recipe, generator, plan.channels
            )
        return Problem(weight, moment, order, plan.layout, plan.tables)


def seeded(seed: int, label: str) -> torch.Generator:
    """Return a generator that depends on the run's seed and on what it is for, not on the order."""
    digest = hashlib.blake2b(f"{seed}:{label}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest))
