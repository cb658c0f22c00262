"""Unquantized folders: both dialects of Qwen2-VL, fused as transformers' own weights say."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mgvq_runtime.checkpoint.hf_names import DIALECTS, detect, map_names
from mgvq_runtime.checkpoint.reader import open_checkpoint
from mgvq_runtime.errors import CheckpointError

Tensors = dict[str, Tensor]


def layer_names(prefix: str) -> list[str]:
    names = ["input_layernorm.weight", "post_attention_layernorm.weight"]
    names += [f"self_attn.{p}_proj.{kind}" for p in "qkv" for kind in ("weight", "bias")]
    names += ["self_attn.o_proj.weight", "mlp.down_proj.weight"]
    names += ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
    return [f"{prefix}.{name}" for name in names]


def tiny_tensors(layers: int = 2, blocks: int = 2) -> Tensors:
    """Hub names with shapes of a model 8 wide, drawn at random."""
    draw = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        "visual.patch_embed.proj.weight": (8, 3, 2, 14, 14),
        "model.embed_tokens.weight": (20, 8),
        "model.norm.weight": (8,),
    }
    for i in range(layers):
        for name in layer_names(f"model.layers.{i}"):
            rows = 4 if ".k_proj" in name or ".v_proj" in name else 8
            shapes[name] = (rows,) if "norm" in name or "bias" in name else (rows, 8)
    stems = [f"visual.blocks.{i}.{n}" for i in range(blocks) for n in ("norm1", "norm2")]
    stems += [
        f"visual.blocks.{i}.{n}"
        for i in range(blocks)
        for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    ]
    for stem in [*stems, "visual.merger.ln_q", "visual.merger.mlp.0", "visual.merger.mlp.2"]:
        shapes[f"{stem}.bias"] = (8,)
        shapes[f"{stem}.weight"] = (8,) if "norm" in stem or "ln_q" in stem else (8, 8)
    return {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}


def v5_name(name: str) -> str:
    if name.startswith("visual."):
        return "model." + name
    return name.replace("model.", "model.language_model.", 1) if "lm_head" not in name else name


def write_folder(folder: Path, tensors: Tensors, num_shards: int = 1) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "qwen2_vl"}')
    if num_shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names = sorted(tensors)
    weight_map = {}
    for i in range(num_shards):
        part = f"model-{i + 1:05d}-of-{num_shards:05d}.safetensors"
        mine = names[i::num_shards]
        save_file({name: tensors[name] for name in mine}, folder / part)
        weight_map |= dict.fromkeys(mine, part)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def read_dense(folder: Path) -> Tensors:
    checkpoint = open_checkpoint(folder)
    assert checkpoint.quantization is None
    read = dict(checkpoint.tensors())
    for name, tensor in read.items():
        assert tuple(tensor.shape) == checkpoint.dense[name].shape
        assert tensor.dtype == checkpoint.dense[name].dtype
    return read


def expected(tensors: Tensors) -> Tensors:
    """Fuse by hand."""
    result = {n: t for n, t in tensors.items() if not any(p in n for p in PARTS)}
    result["visual.patch_embed.proj.weight"] = tensors["visual.patch_embed.proj.weight"].flatten(1)
    for i in range(2):
        stem = f"model.layers.{i}"
        for kind in ("weight", "bias"):
            parts = [tensors[f"{stem}.self_attn.{p}_proj.{kind}"] for p in "qkv"]
            result[f"{stem}.self_attn.qkv_proj.{kind}"] = torch.cat(parts)
        gate_up = [tensors[f"{stem}.mlp.{p}_proj.weight"] for p in ("gate", "up")]
        result[f"{stem}.mlp.gate_up_proj.weight"] = torch.cat(gate_up)
    return result


PARTS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("rename", [str, v5_name], ids=["hub", "transformers5"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_dialects_give_our_names(
    tmp_path: Path, num_shards: int, rename: Callable[[str], str], dtype: torch.dtype
) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in tiny_tensors().items()}
    tensors["lm_head.weight"] = torch.randn(20, 8).to(dtype)
    folder = write_folder(
        tmp_path / "model", {rename(n): t for n, t in tensors.items()}, num_shards
    )
    read = read_dense(folder)
    wanted = expected(tensors)
    assert set(read) == set(wanted)
    assert all(torch.equal(read[name], wanted[name]) for name in wanted)


def test_a_real_transformers_model_is_consumed_whole(
    tiny_qwen2_vl_folder: Path, tiny_qwen2_vl_v5_folder: Path
) -> None:
    """Both folders hold the same model: the same parameters come out, every tensor used."""
    hub, v5 = read_dense(tiny_qwen2_vl_folder), read_dense(tiny_qwen2_vl_v5_folder)
    assert set(hub) == set(v5)
    assert all(torch.equal(hub[name], v5[name]) for name in hub)
    on_disk = load_file(tiny_qwen2_vl_folder / "model.safetensors")
    assert sum(t.numel() for t in hub.values()) == sum(t.numel() for t in on_disk.values())


def test_recomputed_frequencies_are_left_out(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    wanted = set(expected(tensors))
    tensors["visual.rotary_pos_emb.inv_freq"] = torch.ones(4)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    assert set(read_dense(write_folder(tmp_path / "model", tensors))) == wanted


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            lambda t: t.pop("model.layers.1.self_attn.k_proj.bias"),
            "missing tensor model.layers.1.self_attn.k_proj.bias",
        ),
        (lambda t: t.pop("model.norm.weight"), "missing tensor model.norm.weight"),
        (
            lambda t: t.update({"model.layers.0.x_proj.weight": torch.ones(2, 2)}),
            "unknown tensor model.layers.0.x_proj.weight",
        ),
        (
            lambda t: t.update({"model.layers.007.mlp.up_proj.weight": torch.ones(2, 2)}),
            "unknown tensor model.layers.007.mlp.up_proj.weight",
        ),
        (
            lambda t: t.update({n: torch.ones(2) for n in layer_names("model.layers.5")}),
            "model.layers.2 is missing, later ones are there",
        ),
        (
            lambda t: t.update({"model.layers.0.self_attn.v_proj.weight": torch.ones(4, 7)}),
            "shapes [8, 8], [4, 8], [4, 7] cannot be stacked",
        ),
        (
            lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.ones(8, 8).half()}),
            "dtype is F32, F16",
        ),
        (lambda t: t.update({"model.norm.weight": torch.ones(8).int()}), "dtype is I32"),
        (
            lambda t: t.update({"visual.patch_embed.proj.weight": torch.ones(8, 1176)}),
            "expected a convolution",
        ),
        (
            lambda t: t.update({"model.embed_tokens.weight": torch.ones(2, 4, 8)}),
            "expected a vector or a matrix, got [2, 4, 8]",
        ),
    ],
)
def test_what_does_not_fit_is_named(
    tmp_path: Path, change: Callable[[Tensors], object], problem: str
) -> None:
    tensors = tiny_tensors()
    change(tensors)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(write_folder(tmp_path / "model", tensors))
    assert problem in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_all_problems_come_at_once() -> None:
    names = [v5_name(n) for n in tiny_tensors() if "k_proj" not in n] + ["model.visual.extra"]
    with pytest.raises(CheckpointError) as caught:
        map_names(names)
    assert len(caught.value.problems) == 5
    assert any("model.language_model.layers.1.self_attn.k_proj.weight" in p
               for p in caught.value.problems)  # fmt: skip


def test_detection_looks_at_names_only() -> None:
    names = list(tiny_tensors())
    assert detect(names).name == "Qwen2-VL, hub"
    assert detect([v5_name(name) for name in names]).name == "Qwen2-VL, transformers 5"
    with pytest.raises(CheckpointError, match=r"known: .*Qwen2-VL, transformers 5; Qwen2-VL, hub"):
        detect(["transformer.h.0.attn.c_attn.weight", "wte.weight"])
    with pytest.raises(CheckpointError, match="first names here: none"):
        detect([])


def test_rules_never_compete() -> None:
    """Within a dialect a tensor belongs to one rule, and a parameter is made by one."""
    for dialect in DIALECTS:
        theirs = [name for rule in dialect.rules for name in rule.theirs]
        assert len(set(theirs)) == len(theirs), dialect.name
        ours = [rule.ours for rule in dialect.rules]
        assert len(set(ours)) == len(ours), dialect.name


CONSOLIDATED = "consolidated.safetensors"


class TestFiles:
    """Which files a folder holds, before any name is looked at."""

    def test_pickles_are_refused_with_the_way_out(self, tmp_path: Path) -> None:
        """The command that the message gives makes the folder readable, whatever its name."""
        folder = write_folder(tmp_path / "it's $HOME's \"model\"", tiny_tensors())
        tensors = tiny_tensors()
        halves = [sorted(tensors)[0::2], sorted(tensors)[1::2]]
        for i, names in enumerate(halves):
            part = {name: tensors[name] for name in names}
            torch.save(part, folder / f"pytorch_model-0000{i + 1}-of-00002.bin")
        (folder / "training_args.bin").write_bytes(b"never opened")
        (folder / "model.safetensors").unlink()
        with pytest.raises(CheckpointError, match="of-00002.bin, a pickle; .* Convert") as caught:
            open_checkpoint(folder)
        command = str(caught.value).partition("Convert it once: ")[2]
        subprocess.run(command.replace("python", sys.executable, 1), shell=True, check=True)
        assert set(read_dense(folder)) == set(expected(tensors))

    def test_pickles_that_are_not_the_model_are_not_to_be_converted(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("{}")
        for name in ("training_args.bin", "optimizer.pt"):
            (tmp_path / name).write_bytes(b"never opened")
        with pytest.raises(CheckpointError, match=r"no model\.safetensors and no \S+json$"):
            open_checkpoint(tmp_path)
        (tmp_path / "consolidated.00.pth").write_bytes(b"never opened")
        with pytest.raises(CheckpointError, match=r"consolidated\.00\.pth is in a layout that"):
            open_checkpoint(tmp_path)
        (tmp_path / "consolidated.safetensors").write_bytes(b"never opened")
        with pytest.raises(CheckpointError, match=r"no model\.safetensors and no .* transformers$"):
            open_checkpoint(tmp_path)

    @pytest.mark.parametrize("num_shards", [1, 3])
    def test_the_same_weights_in_mistrals_layout_are_left_alone(
        self, tmp_path: Path, num_shards: int
    ) -> None:
        """A full download has both, and transformers reads neither more than ours does."""
        folder = write_folder(tmp_path / "model", tiny_tensors(), num_shards)
        save_file({"layers.0.attention.wq.weight": torch.ones(2)}, folder / CONSOLIDATED)
        assert set(read_dense(folder)) == set(expected(tiny_tensors()))

    @pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir(), lambda p: p.touch()])
    def test_no_checkpoint_at_all(self, tmp_path: Path, make: Callable[[Path], None]) -> None:
        make(tmp_path / "x")
        with pytest.raises(CheckpointError, match="does not exist|no config.json|is a file"):
            open_checkpoint(tmp_path / "x")

    def test_no_weights(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(CheckpointError, match=r"no model\.safetensors and no"):
            open_checkpoint(tmp_path)

    def test_another_quantization_is_named(self, tmp_path: Path) -> None:
        folder = write_folder(tmp_path / "model", tiny_tensors())
        config = {"quantization_config": {"quant_method": "awq", "bits": 4}}
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match="with 'awq'; this runtime reads 'mgvq'"):
            open_checkpoint(folder)

    def test_a_quantization_of_null_is_none(self, tmp_path: Path) -> None:
        folder = write_folder(tmp_path / "model", tiny_tensors())
        (folder / "config.json").write_text('{"quantization_config": null}')
        assert set(read_dense(folder)) == set(expected(tiny_tensors()))

    @pytest.mark.parametrize("damage", ["truncate", "drop", "stray", "whole and shards"])
    def test_shards(self, tmp_path: Path, damage: str) -> None:
        folder = write_folder(tmp_path / "model", tiny_tensors(), 3)
        shard = folder / "model-00002-of-00003.safetensors"
        if damage == "truncate":
            shard.write_bytes(shard.read_bytes()[:-10])
            message = "00002-of-00003.safetensors is damaged"
        elif damage == "drop":
            shard.unlink()
            message = "00002-of-00003.safetensors is missing"
        else:
            stray = "model.safetensors" if damage == "whole and shards" else "x.safetensors"
            shard.with_name(stray).write_bytes(shard.read_bytes())
            message = f"{stray} does not belong to model.safetensors.index.json: remove it"
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(folder)
        assert message in str(caught.value)

    @pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a\\b", "x.bin", 3, None])
    def test_the_index_cannot_point_elsewhere(self, tmp_path: Path, name: object) -> None:
        folder = write_folder(tmp_path / "model", tiny_tensors(), 2)
        index = {"weight_map": {"model.norm.weight": name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match="only the name of a"):
            open_checkpoint(folder)

    @pytest.mark.parametrize("change", ["missing", "elsewhere", "no map"])
    def test_index_and_shards_must_agree(self, tmp_path: Path, change: str) -> None:
        folder = write_folder(tmp_path / "model", tiny_tensors(), 2)
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        if change == "missing":
            index["weight_map"]["model.layers.9.x"] = "model-00001-of-00002.safetensors"
        elif change == "elsewhere":
            name = "model.norm.weight"
            other = {1: 2, 2: 1}[int(index["weight_map"][name][6:11])]
            index["weight_map"][name] = f"model-{other:05d}-of-00002.safetensors"
        else:
            index = {"weight_map": []}
        path.write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match="is in no shard|the index says|no weight_map"):
            open_checkpoint(folder)

    @pytest.mark.parametrize(
        "data", [b"[]", b"{", b"\xff", b"[" * 10**5, b"{" + b" " * 17 * 1024**2]
    )
    def test_bad_config(self, tmp_path: Path, data: bytes) -> None:
        folder = write_folder(tmp_path / "model", tiny_tensors())
        (folder / "config.json").write_bytes(data)
        with pytest.raises(CheckpointError, match=r"config\.json"):
            open_checkpoint(folder)
