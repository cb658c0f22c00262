"""Version 1 on disk, byte for byte: what it wrote, and that it is still read."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

import safetensors.torch
import torch

from mgvq_runtime.checkpoint.reader import open_checkpoint
from mgvq_runtime.checkpoint.writer import write_checkpoint
from tests.runtime.checkpoint.conftest import flat
from tests.runtime.checkpoint.make_golden import GOLDEN, contents

FILES = {"config.json", "generation_config.json", "manifest.json", "model.safetensors"}


def test_writer_gives_exactly_these_bytes(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "v1", **contents())
    assert {p.name for p in folder.iterdir()} == {p.name for p in GOLDEN.iterdir()} == FILES
    for name in FILES:
        assert (folder / name).read_bytes() == (GOLDEN / name).read_bytes(), name


def test_reader_gives_back_what_was_written() -> None:
    checkpoint = open_checkpoint(GOLDEN)
    given = contents()
    read = dict(checkpoint.vq_weights())
    assert list(read) == sorted(name for name, _ in given["weights"])
    for name, weight in given["weights"]:
        assert read[name].layout == weight.layout
        assert all(torch.equal(a, b) for a, b in zip(flat(read[name]), flat(weight), strict=True))
    assert read["lm_head"].codebooks[0][0] is read["model.layers.0.mlp.down_proj"].codebooks[0][0]
    dense = dict(checkpoint.tensors())
    assert set(dense) == {name for name, _ in given["dense"]}
    for name, tensor in given["dense"]:
        assert torch.equal(dense[name], tensor.to(torch.float16))
    assert checkpoint.config["hidden_size"] == 8
    assert checkpoint.quantization is not None
    assert checkpoint.quantization.matrices == given["quantization"].matrices
    assert checkpoint.quantization.bits_per_weight["target"] == 2.0


def test_other_tools_read_the_shard() -> None:
    """The file is plain safetensors, aligned: the reference implementation agrees."""
    tensors = safetensors.torch.load_file(GOLDEN / "model.safetensors")
    data = (GOLDEN / "model.safetensors").read_bytes()
    assert struct.unpack("<Q", data[:8])[0] % 8 == 0
    assert tensors["model.layers.0.mlp.down_proj.codes.0.0"].tolist()[0] == [27, 228]
    assert tensors["codebooks.digits.scale"].item() == 0.5
    assert len(tensors) == 12


def test_a_copy_elsewhere_is_the_same_checkpoint(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN, tmp_path / "elsewhere")
    open_checkpoint(tmp_path / "elsewhere").verify()
