"""Quantizing with one block in memory: the same bytes as with all, and no second block."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mgvq_quantizer import cli
from mgvq_quantizer.backward import sides_of
from mgvq_quantizer.batches import embed, encode_pictures, make_batch, unique_pictures
from mgvq_quantizer.dataset import read_data
from mgvq_quantizer.pipeline import quantize
from mgvq_quantizer.recipe import QuantRecipe
from mgvq_quantizer.residence import Residence
from mgvq_quantizer.solver import Solution
from mgvq_quantizer.work_folder import WorkFolder
from mgvq_runtime.checkpoint.reader import open_checkpoint
from mgvq_runtime.errors import CheckpointError
from mgvq_runtime.models.loading import load_model
from tests.quantizer.conftest import QUICK
from tests.quantizer.deep_llama import write_deep_llama
from tests.quantizer.test_pipeline import contents
from tests.runtime.conftest import write_hub_folder

UNTUNED = {**QUICK, "tuning_steps": 0, "codebook_iterations": 1, "descent_sweeps": 0}


def cut(folder: Path, files: int) -> None:
    """Deal the tensors of a folder's one file over several, with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for i in range(files):
        name = f"model-{i + 1:05d}-of-{files:05d}.safetensors"
        mine = {t: tensors[t] for t in sorted(tensors)[i::files]}
        save_file(mine, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(mine, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture(scope="module")
def sharded(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen2-VL in three shards, small enough for its blocks to share tables."""
    folder = tmp_path_factory.mktemp("sharded")
    write_hub_folder(folder, seed=1)
    shutil.copy(dense / "calibration.zip", folder)
    cut(folder, 3)
    return folder


def test_an_interrupted_run_by_block_ends_at_the_bytes_of_a_resident_one(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = QuantRecipe(**{**UNTUNED, "permute": False})  # without trials of orders: half the time
    quantize(sharded, tmp_path / "whole", recipe, show_progress=False)
    save = WorkFolder.save

    def stop(self: WorkFolder, name: str, solution: Solution) -> None:
        save(self, name, solution)
        if name == "model.layers.0.self_attn.o_proj":
            raise KeyboardInterrupt

    output = tmp_path / "by block"
    with monkeypatch.context() as patch:
        patch.setattr(WorkFolder, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            quantize(sharded, output, recipe, show_progress=False, by_block=True)
    quantize(sharded, output, recipe, show_progress=False, by_block=True)
    assert contents(output) == contents(tmp_path / "whole")
    quantization = open_checkpoint(output).quantization
    assert quantization is not None
    labels = [matrix.codebooks[0][0] for matrix in quantization.matrices.values()]
    assert {label.split("-")[0] for label in labels if label} == {"visual", "model"}  # shared


def test_survey_gradients_and_gate_by_block_give_the_bytes_of_a_resident_run(
    tmp_path: Path,
) -> None:
    shape = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    write_deep_llama(tmp_path / "dense", 2, {**shape, **heads}, torch.bfloat16)
    mixed = {"allocation": "model", "bits": 7.5, "guided": True}
    gated = {"two_sided": True, "gradient_shift": True}
    recipe = QuantRecipe(**{**UNTUNED, **mixed, **gated})
    data = tmp_path / "dense/rows.jsonl"
    for by_block in (False, True):
        output = tmp_path / str(by_block)
        quantize(tmp_path / "dense", output, recipe, data, show_progress=False, by_block=by_block)
    assert contents(tmp_path / "True") == contents(tmp_path / "False")
    report = json.loads((tmp_path / "True/quantization_report.json").read_text())
    decoder = [m for n, m in report["matrices"].items() if n.startswith("model.layers.")]
    assert all(m["alone"] > 0.0 and m["gate"] for m in decoder)
    assert max(len(m["bands"]) for m in decoder) > 1


def test_only_the_matrices_of_a_loops_block_are_in_memory(sharded: Path) -> None:
    residence = Residence(open_checkpoint(sharded), "cpu", by_block=True)
    whole = dict(load_model(sharded).named_parameters())

    def filled() -> set[str]:
        parameters = residence.model.named_parameters()
        here = {name: value for name, value in parameters if not value.is_meta}
        assert all(torch.equal(value, whole[name]) for name, value in here.items())
        matrices = [name for name, value in here.items() if value.dim() > 1]
        return {".".join(name.split(".")[:3]) for name in matrices if name.startswith(PREFIXES)}

    layers, tower = residence.model.model.layers, residence.model.visual
    assert filled() == set()
    for i, _ in enumerate(layers):
        assert filled() == {f"model.layers.{i}"}
    for _ in layers[1:]:
        assert filled() == {"model.layers.1"}
        for _ in layers[1:]:  # a loop within a loop shares the block
            assert filled() == {"model.layers.1"}
        assert filled() == {"model.layers.1"}
    assert tower is not None
    for _ in tower.blocks:
        assert filled() == {"visual.blocks.0"}
        break
    assert filled() == set()


PREFIXES = ("model.layers.", "visual.blocks.")


def test_gradients_by_block_are_those_of_one_backward_pass(dense: Path) -> None:
    recipe = QuantRecipe(**UNTUNED)
    graph = Residence(open_checkpoint(dense), "cpu", by_block=True).model
    whole = load_model(dense)
    data = read_data(dense, whole, recipe, None)
    batch = make_batch(data.train[:2], "cpu")
    features = encode_pictures(whole, unique_pictures(batch.samples), "cpu")
    names = ["model.layers.0.mlp.gate_up_proj", "model.layers.1.self_attn.o_proj"]

    def losses(log_probs: Tensor) -> list[Tensor]:
        return [-log_probs[:, 3].sum(), log_probs.square().sum()]

    found = sides_of(graph, names, batch, features, losses)
    assert all(p.is_meta for p in graph.model.layers.parameters() if p.dim() > 1)
    kept: list[tuple[Tensor, Tensor]] = []
    for name in names:
        whole.get_submodule(name).register_forward_hook(
            lambda _, args, output: kept.append((args[0], output))
        )
    rows = embed(whole, batch, features).requires_grad_()
    hidden = whole(rows, batch.forward)[batch.answer_rows]
    for i, loss in enumerate(losses(whole.logits(hidden).log_softmax(-1))):
        wanted = torch.autograd.grad(loss, [output for _, output in kept], retain_graph=True)
        for name, (entered, _), gradient in zip(names, kept, wanted, strict=True):
            assert torch.allclose(found[name].inputs, entered, rtol=1e-5, atol=1e-6)
            assert torch.allclose(found[name].gradients[i], gradient, rtol=1e-4, atol=1e-6)
            assert gradient.abs().max() > 1e-3


def test_a_block_that_is_not_finite_is_named(sharded: Path, tmp_path: Path) -> None:
    shutil.copytree(sharded, tmp_path / "source")
    file = next(
        f
        for f in (tmp_path / "source").glob("*.safetensors")
        if "model.layers.1.mlp.down_proj.weight" in load_file(f)
    )
    tensors = load_file(file)
    tensors["model.layers.1.mlp.down_proj.weight"][2, 5] = float("inf")
    save_file(tensors, file, metadata={"format": "pt"})
    recipe = QuantRecipe(**UNTUNED)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.down_proj\.weight"):
        quantize(tmp_path / "source", tmp_path / "out", recipe, show_progress=False, by_block=True)


def test_tuning_end_to_end_is_refused_with_advice(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = ["--model", str(dense), "--output", str(tmp_path / "out"), "--stream"]
    assert cli.main(paths) == 2
    assert "give --tuning-steps 0 with --stream" in capsys.readouterr().err
    assert not (tmp_path / "out.partial").exists()
