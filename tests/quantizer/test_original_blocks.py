"""What a matrix misses: how it is measured beside the run, and what is made of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mgvq_quantizer import stream
from mgvq_quantizer.batches import (
    TokenBatch,
    decoder_runs,
    encode_pictures,
    make_batch,
    unique_pictures,
)
from mgvq_quantizer.bias_correction import mean_error
from mgvq_quantizer.dataset import read_data
from mgvq_quantizer.original_blocks import ADDERS, OriginalBlocks
from mgvq_quantizer.pipeline import quantize
from mgvq_quantizer.recipe import QuantRecipe
from mgvq_quantizer.statistics import Products, Run, input_moment, record_calls
from mgvq_quantizer.walk import walk_blocks
from mgvq_quantizer.work_folder import WorkFolder
from mgvq_runtime.checkpoint.reader import open_checkpoint
from mgvq_runtime.models.causal_lm import CausalLM
from mgvq_runtime.models.loading import fill_model
from tests.quantizer.conftest import QUICK
from tests.quantizer.test_pipeline import contents

NAMES = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
UNTUNED = QuantRecipe(**{**QUICK, "tuning_steps": 0, "vision_bits": 8, "embedding_bits": 8})


def model_of(dense: Path) -> CausalLM:
    return fill_model(open_checkpoint(dense), torch.device("cpu")).float()


def batches_of(dense: Path, model: CausalLM) -> list[TokenBatch]:
    samples = read_data(dense, model, UNTUNED, None).train
    return [make_batch(samples[i::2], "cpu") for i in range(2)]


def runs_of(model: CausalLM, batches: list[TokenBatch]) -> list[Run]:
    samples = [sample for batch in batches for sample in batch.samples]
    features = encode_pictures(model, unique_pictures(samples), "cpu")
    return list(decoder_runs(model, batches, features))


def states_of(model: CausalLM, batches: list[TokenBatch]) -> torch.Tensor:
    """Run a whole model: `[T, D]` float64, what enters the head."""
    return torch.cat([run() for run in runs_of(model, batches)]).double()


def inputs_of(model: CausalLM, batches: list[TokenBatch], name: str) -> torch.Tensor:
    """Run a whole model: `[T, I]` float64 of all batches."""
    calls = record_calls(model.get_submodule(name), runs_of(model, batches))
    return torch.cat([call[0] for call in calls]).double()


def stream_of(model: CausalLM, batches: list[TokenBatch], name: str) -> torch.Tensor:
    """Run a whole model: `[T, D]` float64, what a matrix's outputs are added to."""
    block = model.get_submodule(".".join(name.split(".")[:3]))
    calls = record_calls(block, runs_of(model, batches))
    if name.endswith("down_proj"):
        return torch.cat([block(*call)[1] for call in calls]).double()
    return torch.cat([call[1] if call[0] is None else call[0] + call[1] for call in calls]).double()


@pytest.mark.parametrize("weighted", [False, True])
def test_products_are_means_over_the_rows_of_all_runs(weighted: bool) -> None:
    drawn = torch.Generator().manual_seed(11)
    a, b = torch.randn(2, 6, 3, generator=drawn), torch.randn(2, 6, 4, generator=drawn)
    weights = list(torch.rand(2, 6, generator=drawn)) if weighted else None
    total = Products(weights)
    assert total.mean() is None
    for rows in zip(a, b, strict=True):
        total.add(*rows)
    w = torch.ones(12) if weights is None else torch.cat(weights)
    expected = torch.einsum("t,ti,tj->ij", w, a.view(12, 3), b.view(12, 4)).double() / w.sum()
    found = total.mean()
    assert found is not None
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_what_is_missing_is_that_of_whole_models(dense: Path) -> None:
    """Whatever was changed in the blocks before, and before it in its own block."""
    model, original = model_of(dense), model_of(dense)
    batches = batches_of(dense, model)
    calls = record_calls(model.model.layers[0], runs_of(model, batches))
    beside = OriginalBlocks(calls)
    checked = 0

    def visit(i: int, runs: Sequence[Run]) -> None:
        nonlocal checked
        block = f"model.layers.{i}"
        beside.enter(block, model.model.layers[i])
        for short in NAMES:
            name = f"{block}.{short}"
            module = model.get_submodule(name)
            A, found = beside.look(name, runs)
            assert torch.equal(A, input_moment(name, module, runs))
            now, then = (inputs_of(m, batches, name) for m in (model, original))
            expected = (then - now).T @ now / len(now)
            assert torch.allclose(found.inputs, expected, rtol=1e-3, atol=1e-5)
            assert checked == 0 or bool(expected.any())
            assert (found.stream is not None) == (short in ADDERS)
            if found.stream is not None:
                before, wanted = (stream_of(m, batches, name) for m in (model, original))
                expected = (wanted - before).T @ now / len(now)
                assert torch.allclose(found.stream, expected, rtol=1e-3, atol=1e-5)
                assert i == 0 or bool(expected.any())
            module.weight.mul_(0.9)  # type: ignore[operator, union-attr]
            checked += 1

    walk_blocks(model.model.layers, calls, visit)
    assert checked == len(NAMES) * len(model.model.layers)


@torch.no_grad()
def test_states_miss_the_original_ones_by_less(dense: Path, tmp_path: Path) -> None:
    """Behind the last block, on the calibration data."""
    original = model_of(dense)
    batches = batches_of(dense, original)
    truth, misses = states_of(original, batches), []
    for share in (0.0, 1.0):
        output = tmp_path / str(share)
        quantize(dense, output, replace(UNTUNED, mismatch=share), show_progress=False)
        misses.append(float((states_of(model_of(output), batches) - truth).norm() / truth.norm()))
    assert misses[1] < 0.95 * misses[0]


def test_a_bias_makes_up_for_what_rounding_the_moved_weight_loses(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets = []

    def shift(weight: torch.Tensor, *_: object) -> torch.Tensor:
        return torch.full_like(weight, 0.125, dtype=torch.float64)

    def note(weight: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        targets.append(weight)
        return mean_error(weight, *rest)

    monkeypatch.setattr(stream, "mismatch_shift", shift)
    monkeypatch.setattr(stream, "mean_error", note)
    quantize(dense, tmp_path / "moved", UNTUNED, show_progress=False)
    model = model_of(dense)
    for i in range(len(model.model.layers)):
        weight = model.model.layers[i].self_attn.qkv_proj.weight
        moved = weight + 0.125
        assert any(t.shape == moved.shape and torch.equal(t, moved) for t in targets)


def test_a_stopped_run_goes_on_to_the_same_bytes(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped inside the second block, whose matrices must still see the original first one."""
    quantize(dense, tmp_path / "whole", UNTUNED, show_progress=False)
    save = WorkFolder.save

    def stop_after(self: WorkFolder, name: str, solution: object) -> None:
        save(self, name, solution)  # type: ignore[arg-type]
        if name == "model.layers.1.self_attn.o_proj":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(WorkFolder, "save", stop_after)
        with pytest.raises(KeyboardInterrupt):
            quantize(dense, tmp_path / "stopped", UNTUNED, show_progress=False)
    quantize(dense, tmp_path / "stopped", UNTUNED, show_progress=False)
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")
