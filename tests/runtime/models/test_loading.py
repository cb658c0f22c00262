"""Filling the graph: total, exact, quantized or not; what does not fit is listed, all of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mgvq_kernels.layout import VQLayout, VQWeight
from mgvq_kernels.ops import vq_dequantize
from mgvq_runtime.checkpoint.reader import open_checkpoint
from mgvq_runtime.checkpoint.spec import MatrixSpec, QuantizationSpec
from mgvq_runtime.checkpoint.writer import write_checkpoint
from mgvq_runtime.errors import CheckpointError, ConfigError
from mgvq_runtime.layers.embedding import VQEmbedding
from mgvq_runtime.layers.forward_batch import LayerCache
from mgvq_runtime.layers.linear import LayerFactory, VQLinear
from mgvq_runtime.models.config import Qwen2VLConfig
from mgvq_runtime.models.loading import load_model
from mgvq_runtime.models.qwen2_vl import Qwen2VL
from tests.runtime.layers.random_weight import random_weight
from tests.runtime.models.paged import PagedRunner, start

Tensors = dict[str, torch.Tensor]
IMAGE_GRID = (1, 4, 4)


def edited(
    source: Path,
    target: Path,
    edit: Callable[[Tensors], None] = lambda tensors: None,
    **config: Any,
) -> Path:
    """Copy a dense folder with other tensors or another config."""
    target.mkdir()
    tensors = load_file(source / "model.safetensors")
    edit(tensors)
    save_file({n: t.clone() for n, t in tensors.items()}, target / "model.safetensors")
    values = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(values | config))
    return target


def test_dense_parameters_are_those_of_the_file(tiny_qwen2_vl_folder: Path) -> None:
    model = load_model(tiny_qwen2_vl_folder)
    tensors = load_file(tiny_qwen2_vl_folder / "model.safetensors")
    layer = model.model.layers[1]
    prefix = "model.layers.1"
    names = [f"{prefix}.self_attn.{p}_proj" for p in "qkv"]
    fused = torch.cat([tensors[f"{n}.weight"] for n in names])
    assert torch.equal(layer.self_attn.qkv_proj.weight, fused)
    fused = torch.cat([tensors[f"{n}.bias"] for n in names])
    assert torch.equal(layer.self_attn.qkv_proj.bias, fused)
    fused = torch.cat([tensors[f"{prefix}.mlp.{p}_proj.weight"] for p in ("gate", "up")])
    assert torch.equal(layer.mlp.gate_up_proj.weight, fused)
    patches = tensors["visual.patch_embed.proj.weight"]
    assert torch.equal(model.visual.patch_embed.proj.weight, patches.flatten(1))
    assert not model.training
    assert not any(p.requires_grad or p.is_meta for p in model.parameters())
    assert not any(b.is_meta for b in model.buffers())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_dtypes(tiny_qwen2_vl_folder: Path, dtype: torch.dtype) -> None:
    model = load_model(tiny_qwen2_vl_folder, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    full = load_model(tiny_qwen2_vl_folder)
    ids, patches = [1, 2, *[model.config.image_token_id] * 4, 3], torch.randn(16, 1176)
    logits = []
    for each in (model, full):
        sequence = start(each, ids, patches, [IMAGE_GRID])  # the model casts the patches
        runner = PagedRunner(each)
        runner.caches = [
            LayerCache(one.keys.to(each.dtype), one.values.to(each.dtype)) for one in runner.caches
        ]
        (out,) = runner.step([(sequence, len(ids))])
        logits.append(out)
    assert logits[0].dtype == torch.float32
    assert (logits[0] - logits[1]).abs().max() < 0.03 * logits[1].abs().max()


def test_every_misfit_is_listed(tiny_qwen2_vl_folder: Path, tmp_path: Path) -> None:
    """Two wrong shapes and a missing block, in one error."""
    config = {"intermediate_size": 96, "num_hidden_layers": 3}
    folder = edited(tiny_qwen2_vl_folder, tmp_path / "a", **config)
    with pytest.raises(CheckpointError) as error:
        load_model(folder)
    message = "\n".join(error.value.problems)
    for expected in (
        "model.layers.0.mlp.gate_up_proj.weight is [256, 64], expected [192, 64]",
        "model.layers.1.mlp.down_proj.weight is [64, 128], expected [64, 96]",
        "model.layers.2.self_attn.qkv_proj.bias [128] is not in the checkpoint",
        "model.layers.2.input_layernorm.weight [64] is not in the checkpoint",
    ):
        assert expected in message


def test_more_layers_than_the_config_says(tiny_qwen2_vl_folder: Path, tmp_path: Path) -> None:
    folder = edited(tiny_qwen2_vl_folder, tmp_path / "a", num_hidden_layers=1)
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.\S+ is in the checkpoint, but"):
        load_model(folder)


@pytest.mark.parametrize("said", [480, 600])
def test_the_token_table_says_how_long_the_vocabulary_is(
    tiny_qwen2_vl_folder: Path, tmp_path: Path, said: int
) -> None:
    """Tables are padded, or tokens were added and the file was not told."""
    model = load_model(edited(tiny_qwen2_vl_folder, tmp_path / "a", vocab_size=said))
    as_it_was = load_model(tiny_qwen2_vl_folder)
    assert model.config == as_it_was.config
    assert model.config.text_config.vocab_size == 512
    ours, theirs = (dict(each.named_parameters()) for each in (model, as_it_was))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_longer_head_than_table_is_an_error(tiny_qwen2_vl_folder: Path, tmp_path: Path) -> None:
    def lengthen(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = torch.zeros(520, 64)

    folder = edited(tiny_qwen2_vl_folder, tmp_path / "a", lengthen, tie_word_embeddings=False)
    message = r"lm_head.weight is \[520, 64\], expected \[512, 64\]"
    with pytest.raises(CheckpointError, match=message):
        load_model(folder)


def test_other_widths_stay_errors(tiny_qwen2_vl_folder: Path, tmp_path: Path) -> None:
    def narrow(tensors: Tensors) -> None:
        name = "model.embed_tokens.weight"
        tensors[name] = tensors[name][:500, :60].contiguous()

    message = r"model.embed_tokens.weight is \[500, 60\], expected \[512, 64\]"
    with pytest.raises(CheckpointError, match=message):
        load_model(edited(tiny_qwen2_vl_folder, tmp_path / "a", narrow))


def test_placeholders_are_tokens_of_the_table(tiny_qwen2_vl_folder: Path, tmp_path: Path) -> None:
    """A picture's must be there; without one for videos, a model takes none."""
    folder = edited(tiny_qwen2_vl_folder, tmp_path / "a", image_token_id=512)
    with pytest.raises(ConfigError, match="image_token_id 512 is outside the vocabulary of 512"):
        load_model(folder)
    model = load_model(edited(tiny_qwen2_vl_folder, tmp_path / "b", video_token_id=512))
    assert model.config.video_token_id is None
    assert load_model(tiny_qwen2_vl_folder).config.video_token_id is not None


def test_a_head_that_is_not_there_is_the_table(tiny_qwen2_vl_folder: Path, tmp_path: Path) -> None:
    model = load_model(edited(tiny_qwen2_vl_folder, tmp_path / "a", tie_word_embeddings=False))
    assert model.config == load_model(tiny_qwen2_vl_folder).config
    hidden = torch.randn(2, 64)
    assert torch.equal(model.logits(hidden), hidden @ model.model.embed_tokens.weight.T)


def test_a_tied_head_may_be_repeated_and_is_used_where_it_differs(
    tiny_qwen2_vl_folder: Path, tmp_path: Path
) -> None:
    """As transformers 5 does, whatever config.json says."""
    from transformers import Qwen2VLForConditionalGeneration

    def repeat(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]

    def differ(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1e-3

    model = load_model(edited(tiny_qwen2_vl_folder, tmp_path / "a", repeat))
    assert "lm_head.weight" not in dict(model.named_parameters())
    assert model.config.tie_word_embeddings
    folder = edited(tiny_qwen2_vl_folder, tmp_path / "b", differ)
    model = load_model(folder)
    assert not model.config.tie_word_embeddings
    theirs = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(model.lm_head.weight, theirs.lm_head.weight)
    assert torch.equal(model.model.embed_tokens.weight, theirs.get_input_embeddings().weight)
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_a_quantized_head_is_used_whatever_config_says(
    tiny_qwen2_vl_folder: Path, tmp_path: Path
) -> None:
    """A folder whose config.json wrongly says that the head is the table can be quantized."""

    def differ(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1e-3

    folder = edited(tiny_qwen2_vl_folder, tmp_path / "a", differ)
    for name in ("tokenizer.json", "preprocessor_config.json"):
        shutil.copy(tiny_qwen2_vl_folder / name, folder)
    layouts = {n: VQLayout.uniform(512, 64, 4) for n in ("lm_head", "model.embed_tokens")}
    weights = {n: random_weight(lay, seed) for seed, (n, lay) in enumerate(layouts.items())}
    for index, kept in enumerate((layouts, {"lm_head": layouts["lm_head"]})):
        target = tmp_path / str(index)
        write_quantized(folder, target, kept, {name: weights[name] for name in kept})
        model = load_model(target)
        hidden = torch.randn(2, 64)
        expected = hidden @ vq_dequantize(weights["lm_head"]).float().T
        assert torch.allclose(model.logits(hidden), expected, rtol=1e-2, atol=1e-2)


def test_values_that_are_not_finite(tiny_qwen2_vl_folder: Path, tmp_path: Path) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors["model.norm.weight"][3] = torch.nan
        tensors["visual.merger.ln_q.bias"][0] = 1e6

    folder = edited(tiny_qwen2_vl_folder, tmp_path / "a", spoil)
    with pytest.raises(CheckpointError, match="model.norm.weight has values that are not finite"):
        load_model(folder)
    with pytest.raises(CheckpointError) as error:
        load_model(folder, dtype=torch.float16)
    assert len(error.value.problems) == 2
    assert "visual.merger.ln_q.bias" in str(error.value)


def test_unknown_architecture(tiny_qwen2_vl_folder: Path, tmp_path: Path) -> None:
    folder = edited(tiny_qwen2_vl_folder, tmp_path / "a", architectures=["Qwen9"])
    with pytest.raises(ConfigError, match="'Qwen9' is not supported; known: .*Qwen2VL"):
        load_model(folder)


def matrix_layouts(config: Qwen2VLConfig) -> dict[str, VQLayout]:
    """A layout for every matrix of the model, of several rates, some permuted."""
    with torch.device("meta"):
        dense = Qwen2VL(config, LayerFactory())
    layouts = {}
    rates = [2, 4, 3, 8]
    for i, (name, module) in enumerate(dense.named_modules()):
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            rows, columns = module.weight.shape
            is_head = name in ("lm_head", "model.embed_tokens")
            layouts[name] = VQLayout.uniform(rows, columns, rates[i % 4], not is_head and i % 2 > 0)
    return layouts


def write_quantized(
    source: Path, target: Path, layouts: dict[str, VQLayout], weights: dict[str, VQWeight]
) -> None:
    checkpoint = open_checkpoint(source)
    dense = [(n, t) for n, t in checkpoint.tensors() if n.removesuffix(".weight") not in layouts]
    files = [source / "tokenizer.json", source / "preprocessor_config.json"]
    spec = QuantizationSpec({name: MatrixSpec(layout) for name, layout in layouts.items()})
    write_checkpoint(target, checkpoint.config, spec, dense, weights.items(), files)


@pytest.fixture(scope="module")
def quantized(
    tiny_qwen2_vl_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A fully quantized folder, and the dense folder that holds the same matrices decoded."""
    base = tmp_path_factory.mktemp("quantized")
    values = json.loads((tiny_qwen2_vl_folder / "config.json").read_text())
    layouts = matrix_layouts(Qwen2VLConfig.from_hf(values))
    weights = {n: random_weight(lay, seed) for seed, (n, lay) in enumerate(layouts.items())}
    write_quantized(tiny_qwen2_vl_folder, base / "quantized", layouts, weights)
    decoded = {f"{n}.weight": vq_dequantize(w) for n, w in weights.items()}

    def swap(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[name] = tensors[name].half().float()  # as norms and biases are stored
        for name, matrix in decoded.items():
            for part, rows in split_rows(name, matrix):
                tensors[part] = rows.reshape(tensors[part].shape)

    edited(tiny_qwen2_vl_folder, base / "decoded", swap)
    return base / "quantized", base / "decoded"


def split_rows(name: str, matrix: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """Take a fused projection apart again: 4 query heads of 16, 2 key and 2 value heads."""
    if ".qkv_proj." in name:
        parts = matrix.split([64, 32, 32])
        return [(name.replace("qkv_", f"{p}_"), m) for p, m in zip("qkv", parts, strict=True)]
    if ".gate_up_proj." in name:
        gate, up = matrix.chunk(2)
        return [(name.replace("gate_up", "gate"), gate), (name.replace("gate_up", "up"), up)]
    return [(name, matrix)]


def test_quantized_model_is_its_decoded_self(quantized: tuple[Path, Path]) -> None:
    """Every matrix quantized, the tied table and the vision tower included."""
    model, dense = (load_model(folder) for folder in quantized)
    assert isinstance(model.model.embed_tokens, VQEmbedding)
    assert isinstance(model.visual.patch_embed.proj, VQLinear)
    assert isinstance(model.model.layers[0].mlp.gate_up_proj, VQLinear)
    assert all(p.ndim == 1 for p in model.parameters())
    ids = [5, 9, *[model.config.image_token_id] * 64, 7, 300, 2]
    patches = torch.randn(256, 1176, generator=torch.Generator().manual_seed(0))
    logits = []
    for each in (model, dense):
        sequence = start(each, ids, patches, [(1, 16, 16)])
        runner = PagedRunner(each)
        parts = runner.step([(sequence, len(ids))])
        for token in (11, 12):
            sequence.append(each, token)
            parts += runner.step([(sequence, 1)])
        logits.append(torch.cat(parts))
    assert logits[1].abs().max() > 1
    # Few rows go through 16-bit partial sums; many are multiplied by the decoded matrix.
    num_prompt = len(ids)
    error = (logits[0][:num_prompt] - logits[1][:num_prompt]).abs().max()
    assert error < 1e-4 * logits[1].abs().max()
    assert (logits[0] - logits[1]).abs().max() < 2e-3 * logits[1].abs().max()


def test_a_quantized_table_says_how_long_the_vocabulary_is(
    quantized: tuple[Path, Path], tmp_path: Path
) -> None:
    """The config a checkpoint was written with may be wrong there, as its source's was."""
    source = open_checkpoint(quantized[0])
    spec = source.quantization
    assert spec is not None
    config = {**source.config, "vocab_size": 500, "tie_word_embeddings": False}
    del config["quantization_config"]
    write_checkpoint(tmp_path / "q", config, spec, source.tensors(), source.vq_weights(), [])
    model = load_model(tmp_path / "q")
    assert model.config == load_model(quantized[0]).config


def test_quantized_table_gives_the_asked_dtype(quantized: tuple[Path, Path]) -> None:
    model = load_model(quantized[0], dtype=torch.bfloat16)
    assert model.embed(torch.tensor([3])).dtype == torch.bfloat16


def test_layouts_that_are_not_the_models(tiny_qwen2_vl_folder: Path, tmp_path: Path) -> None:
    layouts = {
        "model.layers.0.mlp.down_proj": VQLayout.uniform(64, 64, 2),
        "model.layers.0.mlp.sideways_proj": VQLayout.uniform(64, 64, 2),
    }
    weights = {name: random_weight(layout, 0) for name, layout in layouts.items()}
    write_quantized(tiny_qwen2_vl_folder, tmp_path / "q", layouts, weights)
    with pytest.raises(CheckpointError) as error:
        load_model(tmp_path / "q")
    problems = error.value.problems
    assert any("down_proj is quantized as [64, 64], expected [64, 128]" in p for p in problems)
    assert any("sideways_proj is quantized, but this model has no such" in p for p in problems)


def test_a_folder_is_never_written_to(tiny_qwen2_vl_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "read_only"
    shutil.copytree(tiny_qwen2_vl_folder, folder)
    before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    load_model(folder)
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == before
