"""The demonstration and the decode benchmark run, and end with one JSON document."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import bench_decode, demo


def test_the_demonstration_prints_answer_speed_and_memory(
    tiny_qwen2_vl_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "red.png"
    Image.new("RGB", (56, 56), (255, 0, 0)).save(picture)
    folder = str(tiny_qwen2_vl_folder)
    arguments = ["--checkpoint", folder, "--image", str(picture), "--max-new-tokens", "4", "Why?"]
    assert demo.main(arguments) == 0
    shown = capsys.readouterr().out
    result = json.loads(shown.splitlines()[-1])
    assert f"answer    {result['answer']}"[:12] in shown
    assert (result["image_tokens"], result["question"]) == (4, "Why?")
    assert result["prompt_tokens"] > 4
    assert 1 <= result["new_tokens"] <= 4
    assert result["ttft_s"] > 0
    file_bytes = (tiny_qwen2_vl_folder / "model.safetensors").stat().st_size
    assert 0.9 * file_bytes < result["weights_bytes"] <= file_bytes
    assert demo.main(["--checkpoint", "/nowhere", "--image", str(picture)]) == 2


def test_the_decode_benchmark_compares_two_checkpoints(
    tiny_qwen2_vl_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, output = str(tiny_qwen2_vl_folder), tmp_path / "result.json"
    sizes = ["--prompt-tokens", "8", "--new-tokens", "5", "--repeats", "3"]
    pair = ["--checkpoint", folder, "--reference", folder, "--reference-dtype", "bfloat16"]
    assert bench_decode.main([*pair, *sizes, "--device", "cpu", "--output", str(output)]) == 0
    shown = capsys.readouterr().out
    result = json.loads(shown.splitlines()[-1])
    assert result == json.loads(output.read_text())
    assert [result[side]["dtype"] for side in ("checkpoint", "reference")] == [
        "float32",
        "bfloat16",
    ]
    assert result["checkpoint"]["weights_bytes"] > 1.9 * result["reference"]["weights_bytes"]
    assert result["speedup_min"] <= result["speedup"] <= result["speedup_max"]
    assert bench_decode.main([*pair[:3], "/nowhere", *sizes]) == 2
