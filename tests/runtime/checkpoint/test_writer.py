"""Writing: round trip, shards, all or nothing, and what is refused before it reaches a disk."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mgvq_runtime.checkpoint import shards, writer
from mgvq_runtime.checkpoint.reader import open_checkpoint
from mgvq_runtime.checkpoint.spec import QuantizationSpec
from mgvq_runtime.checkpoint.writer import write_checkpoint
from mgvq_runtime.errors import CheckpointError
from tests.runtime.checkpoint.conftest import flat

Arguments = Callable[..., dict[str, Any]]


@pytest.mark.parametrize("shard_bytes", [1, 3000, 10**9])
def test_round_trip(
    tmp_path: Path, make_arguments: Arguments, monkeypatch: pytest.MonkeyPatch, shard_bytes: int
) -> None:
    monkeypatch.setattr(writer, "SHARD_BYTES", shard_bytes)
    given = make_arguments(3)
    folder = write_checkpoint(tmp_path / "out", **given)
    checkpoint = open_checkpoint(folder)
    checkpoint.verify()
    read = dict(checkpoint.vq_weights())
    assert set(read) == {name for name, _ in given["weights"]}
    for name, weight in given["weights"]:
        assert all(map(torch.equal, flat(read[name]), flat(weight)))
    for name, tensor in checkpoint.tensors():
        assert torch.equal(tensor, dict(given["dense"])[name].to(torch.float16))
        assert checkpoint.dense[name].shape == tuple(tensor.shape)
    assert (folder / "tokenizer.json").read_bytes() == given["extra_files"]["tokenizer.json"]
    parts = sorted(p.name for p in folder.glob("*.safetensors"))
    has_index = (folder / "model.safetensors.index.json").exists()
    assert has_index == (parts != ["model.safetensors"])
    if has_index:
        index = json.loads((folder / "model.safetensors.index.json").read_bytes())
        assert index["weight_map"] == {n: f.path.name for n, f in checkpoint.files.items()}
        assert parts[0] == f"model-00001-of-{len(parts):05d}.safetensors"


def test_equal_contents_give_equal_bytes(tmp_path: Path, make_arguments: Arguments) -> None:
    first = write_checkpoint(tmp_path / "first", **make_arguments())
    given = make_arguments()
    given["weights"].reverse()
    given["dense"] = (item for item in reversed(given["dense"]))
    second = write_checkpoint(tmp_path / "second", **given)
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name


def test_bits_are_counted_not_believed(tmp_path: Path, make_arguments: Arguments) -> None:
    given = make_arguments()
    spec = given["quantization"]
    given["quantization"] = QuantizationSpec(spec.matrices, {"target": 2.5, "total": 1.0})
    quantization = open_checkpoint(write_checkpoint(tmp_path / "out", **given)).quantization
    assert quantization is not None
    assert quantization.bits_per_weight["target"] == 2.5
    assert quantization.bits_per_weight["total"] > 10


def left_behind(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("failing_write", range(6))
def test_a_full_disk_leaves_nothing(
    tmp_path: Path,
    make_arguments: Arguments,
    monkeypatch: pytest.MonkeyPatch,
    failing_write: int,
) -> None:
    """fsync number n says the disk is full: the error says so, nothing stays."""
    monkeypatch.setattr(writer, "SHARD_BYTES", 3000)
    calls = []

    def fsync(handle: int) -> None:
        calls.append(handle)
        if len(calls) == failing_write + 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shards.os, "fsync", fsync)
    with pytest.raises(
        CheckpointError, match=r"disk is full: .*of [\d,]+ bytes cannot.*are free; free some space"
    ):
        write_checkpoint(tmp_path / "out", **make_arguments())
    assert left_behind(tmp_path) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_disk_that_is_really_full(
    tmp_path: Path, make_arguments: Arguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_open = Path.open

    def open_on_full_disk(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        return real_open(Path("/dev/full"), "wb") if mode == "xb" else real_open(self, mode)

    monkeypatch.setattr(Path, "open", open_on_full_disk)
    with pytest.raises(CheckpointError, match="disk is full"):
        write_checkpoint(tmp_path / "out", **make_arguments())
    assert left_behind(tmp_path) == []


def test_an_interrupted_producer_leaves_nothing(tmp_path: Path, make_arguments: Arguments) -> None:
    given = make_arguments()

    def interrupted() -> Any:
        yield given["weights"][0]
        assert len(left_behind(tmp_path)) == 1  # the hidden partial folder
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path / "out", **{**given, "weights": interrupted()})
    assert left_behind(tmp_path) == []


def test_overwriting_must_be_asked_for_and_is_all_or_nothing(
    tmp_path: Path, make_arguments: Arguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    write_checkpoint(out, **make_arguments(1))
    before = (out / "manifest.json").read_bytes()
    with pytest.raises(CheckpointError, match="not empty"):
        write_checkpoint(out, **make_arguments(2))
    with pytest.raises(CheckpointError, match="were not given"):
        write_checkpoint(out, **{**make_arguments(2), "weights": []}, overwrite=True)
    assert (out / "manifest.json").read_bytes() == before
    write_checkpoint(out, **make_arguments(2), overwrite=True)
    assert (out / "manifest.json").read_bytes() != before
    open_checkpoint(out).verify()
    assert left_behind(tmp_path) == ["out"]


def test_the_old_checkpoint_returns_if_the_rename_fails(
    tmp_path: Path, make_arguments: Arguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = write_checkpoint(tmp_path / "out", **make_arguments(1))
    before = (out / "manifest.json").read_bytes()
    real_rename = Path.rename

    def rename(self: Path, to: Path) -> Path:
        if ".partial-" in self.name:
            raise PermissionError(errno.EACCES, "Permission denied")
        return real_rename(self, to)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(
        CheckpointError, match="cannot be written: Permission denied.*put that right"
    ):
        write_checkpoint(out, **make_arguments(2), overwrite=True)
    assert (out / "manifest.json").read_bytes() == before
    assert left_behind(tmp_path) == ["out"]


def test_a_folder_that_is_no_checkpoint_is_never_replaced(
    tmp_path: Path, make_arguments: Arguments
) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="is no MGVQ checkpoint, so it is not overwritten"):
        write_checkpoint(tmp_path / "thesis", **make_arguments(), overwrite=True)
    (tmp_path / "empty").mkdir()
    open_checkpoint(write_checkpoint(tmp_path / "empty", **make_arguments()))
    with pytest.raises(CheckpointError, match="not empty"):
        write_checkpoint(tmp_path / "thesis" / "chapter1.tex", **make_arguments())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: g["weights"].pop(), "were not given"),
        (lambda g: g["weights"].append(g["weights"][0]), "not in the spec, or was given twice"),
        (lambda g: g["dense"].append(g["dense"][0]), "was given twice"),
        (lambda g: g["dense"].append(("model.x.weight", torch.arange(3))), "are floats"),
        (lambda g: g["dense"].append(("model.x.weight", torch.tensor([7e4]))), "magnitude 70000"),
        (lambda g: g["dense"].append(("m.x", torch.tensor([float("nan")]))), "not fit float16"),
        (lambda g: g["dense"].append(("../x", torch.ones(1))), "cannot be the name"),
        (lambda g: g["dense"].append(("codebooks.x", torch.ones(1))), "cannot be the name"),
        (
            lambda g: g["dense"].append(("model.embed_tokens.weight", torch.ones(1))),
            "cannot be the name",
        ),
        (lambda g: g["config"].update(quantization_config={"a": 1}), "quantize the original"),
        (lambda g: g["config"].update(x=float("nan")), "cannot be written as JSON"),
        (lambda g: g["extra_files"].update({"run.py": b""}), "allowed endings"),
        (lambda g: g["extra_files"].update({"weights.bin": b""}), "allowed endings"),
        (lambda g: g["extra_files"].update({"config.json": b""}), "name is taken"),
        (lambda g: g["extra_files"].update({"../x.json": b""}), "not plain"),
        (lambda g: g.update(copy_files=[Path("/nowhere/merges.txt")]), "cannot be read"),
        (lambda g: g.update(quantization=QuantizationSpec({})), "no quantized matrix"),
    ],
)
def test_what_is_refused(
    tmp_path: Path,
    make_arguments: Arguments,
    change: Callable[[dict[str, Any]], object],
    message: str,
) -> None:
    given = make_arguments()
    change(given)
    with pytest.raises(CheckpointError, match=message):
        write_checkpoint(tmp_path / "out", **given)
    assert left_behind(tmp_path) == []


def test_shared_codebooks_must_agree(tmp_path: Path, make_arguments: Arguments) -> None:
    given = make_arguments()
    names = [name for name, _ in given["weights"]]
    place = names.index("model.layers.0.mlp.down_proj")
    given["weights"][place][1].codebooks[0][0][3, 1] ^= 1  # shared with qkv_proj by reference
    write_checkpoint(tmp_path / "agreeing", **given)
    given["weights"][place] = make_arguments()["weights"][place]
    with pytest.raises(CheckpointError, match=r"is not codebooks\.coarse"):
        write_checkpoint(tmp_path / "out", **given)


def test_scales_must_be_finite(tmp_path: Path, make_arguments: Arguments) -> None:
    given = make_arguments()
    given["weights"][0][1].scales[0] = float("inf")
    with pytest.raises(CheckpointError, match="not finite"):
        write_checkpoint(tmp_path / "out", **given)
