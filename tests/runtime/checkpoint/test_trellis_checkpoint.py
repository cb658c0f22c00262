"""Checkpoints with a trellis: format version 2, byte for byte; what contradicts itself is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mgvq_kernels import reference
from mgvq_kernels.layout import VQLayout
from mgvq_runtime.checkpoint.bits import count_bits
from mgvq_runtime.checkpoint.manifest import read_manifest
from mgvq_runtime.checkpoint.reader import open_checkpoint
from mgvq_runtime.checkpoint.spec import MatrixSpec, QuantizationSpec, quantized_tensors
from mgvq_runtime.checkpoint.writer import write_checkpoint
from mgvq_runtime.errors import CheckpointError
from mgvq_runtime.inspect import main
from tests.kernels.random_weights import oracle
from tests.runtime.checkpoint.conftest import flat
from tests.runtime.checkpoint.make_golden import GOLDEN, GOLDEN_TRELLIS, trellis_contents
from tests.runtime.checkpoint.test_damage import edit_spec

DOWN = "model.layers.0.mlp.down_proj"
Spec = dict[str, Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the golden checkpoint, to be damaged."""
    return shutil.copytree(GOLDEN_TRELLIS, tmp_path / "v2")


def test_writer_gives_exactly_these_bytes(tmp_path: Path) -> None:
    written = write_checkpoint(tmp_path / "v2", **trellis_contents())
    assert {p.name for p in written.iterdir()} == {p.name for p in GOLDEN_TRELLIS.iterdir()}
    for path in GOLDEN_TRELLIS.iterdir():
        assert (written / path.name).read_bytes() == path.read_bytes(), path.name


def test_reader_gives_back_what_was_written() -> None:
    checkpoint = open_checkpoint(GOLDEN_TRELLIS)
    checkpoint.verify()
    read = dict(checkpoint.vq_weights())
    given = trellis_contents()
    assert set(read) == {name for name, _ in given["weights"]}
    for name, weight in given["weights"]:
        assert read[name].layout == weight.layout
        assert all(map(torch.equal, flat(read[name]), flat(weight)))
        dense = reference.vq_dequantize(read[name], torch.float64)
        torch.testing.assert_close(dense, torch.from_numpy(oracle(weight)), rtol=1e-12, atol=0)
    embedding = read["model.embed_tokens"]
    assert embedding.codebooks[0][0] is embedding.codebooks[1][0]


@pytest.mark.parametrize(("path", "version"), [(GOLDEN, 1), (GOLDEN_TRELLIS, 2)])
def test_only_a_trellis_raises_the_version(path: Path, version: int) -> None:
    spec = json.loads((path / "config.json").read_bytes())["quantization_config"]
    assert spec["format_version"] == version
    assert QuantizationSpec.from_json(spec).format_version == version
    assert read_manifest(path).format_version == version


def test_a_stage_as_it_stands_in_the_file() -> None:
    spec = json.loads((GOLDEN_TRELLIS / "config.json").read_bytes())["quantization_config"]
    (stage,) = spec["matrices"][DOWN]["bands"][0]["stages"]
    assert stage == {"vector_dim": 1, "codec": "trellis", "rate": 2, "window": 12}
    stages = [band["stages"] for band in spec["matrices"]["model.embed_tokens"]["bands"]]
    assert [stage["rate"] for (stage,) in stages] == [1, 3]
    assert spec["matrices"]["lm_head"]["bands"][0]["stages"] == [
        {"vector_dim": 4, "codec": "lookup"},
        {"vector_dim": 8, "codec": "lookup"},
    ]


def test_bits_are_the_size_on_disk() -> None:
    layout = VQLayout.uniform(10, 64, 3, codec="trellis", window=9)
    matrices = {"a": MatrixSpec(layout, (("s",),)), "b": MatrixSpec(layout, (("s",),))}
    codes, scales, book = 2 * 3 * 640, 2 * 16 * 10, 512 * 8 + 32
    assert count_bits(matrices)["total"].bits == codes + scales + book
    assert quantized_tensors(QuantizationSpec(matrices))["codebooks.s"].shape == (512, 1)


def stage_of(spec: Spec) -> Spec:
    stage: Spec = spec["matrices"][DOWN]["bands"][0]["stages"][0]
    return stage


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda spec: stage_of(spec).update(rate=6), "rate must be one of"),
        (lambda spec: stage_of(spec).update(rate=0), "rate must be one of"),
        (lambda spec: stage_of(spec).update(window=13), "window must be one of"),
        (lambda spec: stage_of(spec).update(window="12"), "window must be a whole number"),
        (lambda spec: stage_of(spec).update(vector_dim=2), "vector_dim must be 1"),
        (lambda spec: stage_of(spec).pop("window"), "a trellis stage lacks window"),
        (lambda spec: stage_of(spec).update(codec="lookup"), "a stage has the unknown key 'rate'"),
        (lambda spec: stage_of(spec).update(windows=1), "did you mean 'window'"),
        (lambda spec: stage_of(spec).update(codec="qtip"), "codec 'qtip' is not known"),
        (lambda spec: stage_of(spec).update(rate=1), "the spec says U8 [4, 1]"),
        (lambda spec: stage_of(spec).update(window=11), "the spec says I8 [2048, 1]"),
        (
            lambda spec: spec["matrices"][DOWN]["bands"][0].update(stages=[stage_of(spec)] * 2),
            "a trellis stands alone",
        ),
        (lambda spec: spec.update(format_version=1), "needs format_version 2, the file says 1"),
        (lambda spec: spec.update(format_version=3), "format_version is 3"),
        (lambda spec: spec["matrices"][DOWN].update(shape=[1, 8]), "needs 2 of them"),
    ],
)
def test_contradictions_are_explained(
    folder: Path, edit: Callable[[Spec], None], message: str
) -> None:
    edit_spec(folder, lambda spec: (edit(spec), spec.update(bits_per_weight={}))[-1])
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert message in str(caught.value)


def test_config_and_manifest_are_of_one_version(folder: Path) -> None:
    edit_spec(folder, lambda spec: None)  # the manifest made anew says 1
    with pytest.raises(CheckpointError, match="format_version is 2 in config.json and 1 in mani"):
        open_checkpoint(folder)


def test_a_changed_code_is_found(folder: Path) -> None:
    shard = folder / "model.safetensors"
    data = bytearray(shard.read_bytes())
    place = open_checkpoint(folder).files[f"{DOWN}.codes.0.0"].places[f"{DOWN}.codes.0.0"]
    data[place.start] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{DOWN}.codes.0.0 is damaged"):
        dict(open_checkpoint(folder).vq_weights())


@pytest.mark.parametrize("other", [("lookup", 8), ("trellis", 11)])
def test_a_shared_codebook_has_one_size(other: tuple[str, int]) -> None:
    codec, window = other
    rate = 8 if codec == "lookup" else 2
    twelve = MatrixSpec(VQLayout.uniform(4, 8, 2, codec="trellis"), (("s",),))
    less = MatrixSpec(VQLayout.uniform(4, 8, rate, codec=codec, window=window), (("s",),))
    with pytest.raises(CheckpointError, match=f"vector_dim 1 and {1 << window} entries, another"):
        QuantizationSpec({"a": twelve, "b": less})


def test_inspect_names_the_codec(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(GOLDEN_TRELLIS), "--json", "--verify"]) == 0
    out = capsys.readouterr().out
    assert "format version 2" in out
    assert "trellis, window 12" in out
    bands = json.loads(out.splitlines()[-1])["bands"]
    total = 4 * 8 + 16 * 32 + 16 * 40
    assert {"vector_dims": [1], "bits": 2, "weights": 32, "share": 32 / total} | {
        "trellis_window": 12
    } in bands
    assert [band["bits"] for band in bands] == [1, 2, 3, 3]
