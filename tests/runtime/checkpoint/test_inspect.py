"""`mgvq-inspect`: counted numbers for quantized and unquantized folders, clear refusals else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from mgvq_runtime.inspect import main
from tests.runtime.checkpoint.make_golden import GOLDEN


def test_a_quantized_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(GOLDEN), "--json", "--verify"]) == 0
    out = capsys.readouterr().out
    report = json.loads(out.splitlines()[-1])
    assert report["parameters"] == 4 * 8 + 16 * 32 + 4 + 8
    assert report["groups"]["decoder"]["bits_per_weight"] == 12.0
    assert report["file_bytes"] == sum(p.stat().st_size for p in GOLDEN.iterdir())
    assert report["bands"][0] == {"vector_dims": [4], "bits": 2, "weights": 32, "share": 32 / 544}
    assert report["memory"]["weights_half_bytes"] == report["tensor_bytes"]
    assert "'ExampleModel' is not supported" in report["memory"]["unknown"]
    for words in ("format version 1", "decoder", "12.000", "4 + 8", "94.1%", "all right"):
        assert words in out


def test_an_unquantized_folder(
    tiny_qwen2_vl_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tiny_qwen2_vl_folder), "--json"]) == 0
    out = capsys.readouterr().out
    report = json.loads(out.splitlines()[-1])
    config = json.loads((tiny_qwen2_vl_folder / "config.json").read_text())
    on_disk = load_file(tiny_qwen2_vl_folder / "model.safetensors")
    assert report["parameters"] == sum(tensor.numel() for tensor in on_disk.values())
    assert report["format_version"] is None
    assert report["groups"] == {}
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    kv_numbers = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * head_dim
    assert report["memory"]["kv_token_half_bytes"] == 2 * kv_numbers
    assert report["memory"]["max_image_tokens"] == 1280  # what a server takes, not the hub's file
    assert "Qwen2VLForConditionalGeneration (unquantized)" in out


@pytest.mark.parametrize("name", ["absent", "file", "empty", "damaged"])
def test_bad_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    path = tmp_path / name
    if name == "file":
        path.touch()
    elif name == "empty":
        path.mkdir()
    elif name == "damaged":
        shutil.copytree(GOLDEN, path)
        (path / "model.safetensors").write_bytes(b"")
    assert main([str(path), "--json"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("mgvq-inspect: ")
    assert str(path) in captured.err
    assert "Traceback" not in captured.err


def test_verify_finds_what_headers_do_not_show(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(GOLDEN, tmp_path / "x")
    shard = tmp_path / "x" / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"A")
    assert main([str(tmp_path / "x")]) == 0
    for flags in (["--verify"], ["--verify", "--plan"]):
        assert main([str(tmp_path / "x"), *flags]) == 2
        assert "down_proj.codes.0.0 is damaged" in capsys.readouterr().err


def test_debug_variable(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MGVQ_DEBUG", "1")
    assert main([str(tmp_path / "absent")]) == 2
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("MGVQ_DEBUG", "perhaps")
    assert main([str(GOLDEN)]) == 2
    assert "MGVQ_DEBUG is 'perhaps'; expected one of" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = (
        f"import sys; from mgvq_runtime.inspect import main; sys.exit(main([{str(GOLDEN)!r}]))"
    )
    ran = subprocess.run([sys.executable, "-c", command], stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (ran.returncode, ran.stderr) == (0, b"")
