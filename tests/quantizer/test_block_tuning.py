"""Blocks tuned one by one: what moves, what stays, what it is worth, and that a run can resume."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mgvq_kernels import ops
from mgvq_kernels.layout import VQLayout, VQWeight
from mgvq_quantizer import calibration
from mgvq_quantizer.allocation import MatrixPlan, plan
from mgvq_quantizer.batches import embed, encode_pictures, make_batch, unique_pictures
from mgvq_quantizer.block_tuning import BlockData, BlockTuned, BlockTuner, decoder_states
from mgvq_quantizer.calibration import Sample
from mgvq_quantizer.channel_classes import SHARED
from mgvq_quantizer.gradients import shows_picture
from mgvq_quantizer.knobs import MatrixKnobs
from mgvq_quantizer.pipeline import quantize
from mgvq_quantizer.recipe import QuantRecipe
from mgvq_quantizer.report import Report
from mgvq_quantizer.statistics import record_calls
from mgvq_quantizer.work_folder import ResumeError, WorkFolder
from mgvq_runtime.checkpoint.reader import open_checkpoint
from mgvq_runtime.models.causal_lm import CausalLM
from mgvq_runtime.models.loading import load_model
from mgvq_runtime.multimodal.chat import ChatProcessor
from mgvq_runtime.multimodal.processors.qwen2_vl import Qwen2VLImageProcessor
from mgvq_runtime.tokenizer import Tokenizer
from tests.quantizer.conftest import QUICK
from tests.quantizer.test_pipeline import contents

BLOCKWISE = {**QUICK, "tuning_steps": 0, "block_steps": 12}
BLOCKWISE_RECIPE = QuantRecipe(**{**BLOCKWISE, "scale_lr": 0.02})


@pytest.fixture(scope="module")
def blockwise(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    """The folder at 2 bits, tuned block by block alone, and the report of the run."""
    output = tmp_path_factory.mktemp("blockwise") / "checkpoint"
    return output, quantize(dense, output, BLOCKWISE_RECIPE, show_progress=False)


def random_weight(seed: int, columns: int = 16) -> VQWeight:
    g = torch.Generator().manual_seed(seed)
    layout = VQLayout.uniform(6, columns, 2, has_permutation=True)
    return VQWeight(
        layout,
        ((torch.randint(256, (6, columns // 4), generator=g, dtype=torch.uint8),),),
        ((torch.randint(-127, 128, (256, 4), generator=g).to(torch.int8),),),
        ((torch.rand((), generator=g) + 0.01,),),
        torch.rand(6, generator=g).half() + 0.5,
        torch.randperm(columns, generator=g).int(),
    )


def test_gradients_reach_what_may_move_and_nothing_else() -> None:
    weights = {"own": random_weight(0), "shared": random_weight(1), "elsewhere": random_weight(2)}
    plans = {
        "own": MatrixPlan("own", weights["own"].layout, "own", (SHARED,)),
        "shared": MatrixPlan("shared", weights["shared"].layout, "kind", (SHARED,)),
    }
    (table,) = plans["shared"].tables[0]
    norm = torch.ones(16, requires_grad=False)
    knobs = MatrixKnobs(plans, weights, {"norm.weight": norm}, fixed={table})
    values = knobs.parameters()
    assert set(values) == {"own.weight", "shared.weight", "norm.weight"}
    for name in plans:
        assert torch.allclose(values[f"{name}.weight"], ops.vq_dequantize(weights[name]))
    assert set(knobs.tables) == {plans["own"].tables[0][0]}
    assert set(knobs.scales) == set(plans)
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(3))
    hidden = x * values["norm.weight"]
    loss = sum((hidden @ values[f"{name}.weight"].T).square().sum() for name in plans)
    assert isinstance(loss, Tensor)
    loss.backward()  # type: ignore[no-untyped-call]
    moved = [*knobs.tables.values(), *knobs.scales.values(), *knobs.others.values()]
    assert all(knob.delta.grad is not None and bool(knob.delta.grad.any()) for knob in moved)
    assert norm.grad is None
    optimizer = knobs.optimizer(QuantRecipe(), 100.0)
    optimizer.step()
    stored, vectors = knobs.stored()
    for name in plans:
        assert torch.equal(stored[name].codes[0][0], weights[name].codes[0][0])
        assert not torch.equal(stored[name].scales, weights[name].scales)
    assert not torch.equal(stored["own"].codebooks[0][0], weights["own"].codebooks[0][0])
    assert torch.equal(stored["shared"].codebooks[0][0], weights["shared"].codebooks[0][0])
    assert stored["shared"].codebook_scales[0][0] == weights["shared"].codebook_scales[0][0]
    assert not torch.equal(vectors["norm.weight"], norm)
    assert torch.equal(norm, torch.ones(16))


@pytest.fixture
def work(tmp_path: Path) -> Iterator[WorkFolder]:
    with WorkFolder(tmp_path / "work", {}) as folder:
        yield folder


class Bench:
    """The first decoder block of the tiny model, rounded and ready to be tuned."""

    def __init__(self, dense: Path, rounded: Path, work: WorkFolder, recipe: QuantRecipe) -> None:
        self.model, self.original = load_model(dense), load_model(dense)
        tokenizer = Tokenizer.from_folder(dense)
        images = Qwen2VLImageProcessor.from_folder(dense, None)
        _, conversations = calibration.load_conversations(None, dense)
        processor = ChatProcessor(tokenizer, images, self.model.config)
        self.samples = calibration.prepare(conversations, processor, tokenizer)
        self.features = encode_pictures(self.model, unique_pictures(self.samples), "cpu")
        states = decoder_states(self.model, self.samples, self.features)
        self.train, self.held = self.samples[:-2], self.samples[-2:]
        data = BlockData(self.train, self.held, self.features, states)
        plans = plan(self.model, recipe)
        self.said: list[str] = []
        self.tuner = BlockTuner(self.model, plans, data, recipe, work, self.said.append)
        self.prefix, self.block = "model.layers.0", self.model.model.layers[0]
        self.weights = {
            name: weight
            for name, weight in open_checkpoint(rounded).vq_weights()
            if name.startswith(f"{self.prefix}.")
        }

    def tune(self) -> tuple[dict[str, VQWeight], BlockTuned]:
        self.tuner.enter(self.block)
        with torch.no_grad():
            for name, weight in self.weights.items():
                self.model.get_submodule(name).weight.copy_(ops.vq_dequantize(weight))
            return self.tuner.leave(self.prefix, self.block, self.weights)

    def energies(self, samples: list[Sample], other: CausalLM | None) -> tuple[Tensor, int]:
        """Sums over text and pictures of the squares of the block's outputs, or of what is missing
        to another model's; and the number of tokens.
        """
        sums = torch.zeros(2, dtype=torch.float64)
        for sample in samples:
            outputs = [
                self._output(model, sample) for model in (self.original, other) if model is not None
            ]
            error = outputs[0] if len(outputs) == 1 else outputs[0] - outputs[1]
            shown = shows_picture(sample, self.model.config.image_token_id)
            for kind in range(2):
                sums[kind] += error.double()[shown == bool(kind)].square().sum()
        return sums, sum(len(sample.token_ids) for sample in samples)

    def _output(self, model: CausalLM, sample: Sample) -> Tensor:
        batch = make_batch([sample], "cpu")
        run = lambda: model(embed(model, batch, self.features), batch.forward)  # noqa: E731
        call = record_calls(model.model.layers[1], [run])[0]
        return call[0] + call[1]


def test_a_tuned_block_is_nearer_to_the_original_by_what_it_says(
    dense: Path, quantized: tuple[Path, Report], work: WorkFolder
) -> None:
    recipe = QuantRecipe(**{**BLOCKWISE, "scale_lr": 0.005, "codebook_lr": 0.01})
    bench = Bench(dense, quantized[0], work, recipe)
    tuned, result = bench.tune()
    assert result.step > 0
    assert result.after < 0.9 * result.before
    assert any("model.layers.0, step" in line for line in bench.said)
    energy, count = bench.energies(bench.train, None)
    error, held = bench.energies(bench.held, bench.model)
    expected = float((error / energy).mean()) * count / held
    assert result.after == pytest.approx(expected, rel=1e-3)
    for name, weight in tuned.items():
        matrix = bench.model.get_submodule(name).weight
        assert torch.equal(ops.vq_dequantize(weight), matrix)
        assert torch.equal(weight.codes[0][0], bench.weights[name].codes[0][0])
        # every table of the fixture is shared with the other block
        assert torch.equal(weight.codebooks[0][0], bench.weights[name].codebooks[0][0])
    for name, vector in bench.block.named_parameters():
        assert vector.dim() != 1 or torch.equal(vector, vector.half().float()), name


def test_a_block_that_tuning_would_spoil_stays_as_it_was(
    dense: Path, quantized: tuple[Path, Report], work: WorkFolder
) -> None:
    recipe = QuantRecipe(**{**BLOCKWISE, "block_steps": 2, "scale_lr": 0.9, "codebook_lr": 0.9})
    bench = Bench(dense, quantized[0], work, recipe)
    before = copy.deepcopy(dict(bench.block.named_parameters()))
    tuned, result = bench.tune()
    assert result.step == 0
    assert result.after == result.before
    assert all(tuned[name] is weight for name, weight in bench.weights.items())
    for name, parameter in bench.block.named_parameters():
        if parameter.dim() == 1:
            assert torch.equal(parameter, before[name])


def test_tables_of_the_block_alone_move(
    dense: Path, quantized: tuple[Path, Report], work: WorkFolder
) -> None:
    lively = {"scale_lr": 0.005, "codebook_lr": 0.02, "max_codebook_overhead": 100.0}
    bench = Bench(dense, quantized[0], work, QuantRecipe(**{**BLOCKWISE, **lively}))
    tuned, result = bench.tune()
    assert result.step > 0
    for name, weight in tuned.items():
        assert torch.equal(weight.codes[0][0], bench.weights[name].codes[0][0])
        assert not torch.equal(weight.codebooks[0][0], bench.weights[name].codebooks[0][0])


def test_the_next_block_is_rounded_on_what_the_tuned_one_makes(
    dense: Path, blockwise: tuple[Path, Report], tmp_path: Path
) -> None:
    folder, report = blockwise
    assert list(report.blocks) == ["model.layers.0", "model.layers.1"]
    assert all(block.after < block.before for block in report.blocks.values())
    plain = dataclasses.replace(BLOCKWISE_RECIPE, block_steps=0)
    quantize(dense, tmp_path / "plain", plain, show_progress=False)
    rounded = dict(open_checkpoint(tmp_path / "plain").vq_weights())
    for name, weight in open_checkpoint(folder).vq_weights():
        same_codes = torch.equal(weight.codes[0][0], rounded[name].codes[0][0])
        assert same_codes == (not name.startswith("model.layers.1.")), name
    stored, original = dict(open_checkpoint(folder).tensors()), load_model(dense)
    norm = "model.layers.0.input_layernorm.weight"
    assert not torch.equal(stored[norm], original.get_parameter(norm).half())
    assert torch.equal(stored["model.norm.weight"], original.model.norm.weight.half())


def test_interrupted_anywhere_it_goes_on_to_the_same_bytes(
    dense: Path,
    blockwise: tuple[Path, Report],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Just before a tuned block is kept, and within the next one."""
    stops = ["save_facts tuned.model.layers.0", "save model.layers.1.mlp.gate_up_proj"]
    steps: list[str] = []
    for method in ("save_facts", "save_tensors", "save"):
        original = getattr(WorkFolder, method)

        def stop_after(
            self: WorkFolder, name: str, *values: object, method=method, original=original
        ) -> None:
            original(self, name, *values)
            steps.append(f"{method} {name}")
            if steps[-1] in stops and steps.count(steps[-1]) == 1:
                raise KeyboardInterrupt

        monkeypatch.setattr(WorkFolder, method, stop_after)
    for _ in stops:
        with pytest.raises(KeyboardInterrupt):
            quantize(dense, tmp_path / "cut", BLOCKWISE_RECIPE, show_progress=False)
    report = quantize(dense, tmp_path / "cut", BLOCKWISE_RECIPE, show_progress=False)
    assert {step for step in steps if steps.count(step) > 1} == {stops[0]}
    assert report.blocks == blockwise[1].blocks
    assert contents(tmp_path / "cut") == contents(blockwise[0])


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    with WorkFolder(tmp_path / "run", {}) as work:
        assert work.load_tensors("tuned.a") is None
        work.save_tensors("tuned.a", {"0": torch.arange(3.0)})
        again = work.load_tensors("tuned.a")
        assert again is not None
        assert torch.equal(again[0]["0"], torch.arange(3.0))
        file = tmp_path / "run" / "tuned.a.safetensors"
        file.write_bytes(file.read_bytes()[:-3])
        with pytest.raises(ResumeError, match=r"tuned\.a\.safetensors is damaged"):
            work.load_tensors("tuned.a")
