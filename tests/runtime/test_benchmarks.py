"""The demonstration and the benchmarks of whole models run, and end with one JSON document."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import bench_decode, bench_engine, demo


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


def test_the_engine_benchmark_measures_three_things_in_one_run(
    tiny_qwen2_vl_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "result.json"
    sizes = ["--requests", "2", "--new-tokens", "3", "--repeats", "2"]
    folder = str(tiny_qwen2_vl_folder)
    assert bench_engine.main(["--checkpoint", folder, *sizes, "--output", str(output)]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads(output.read_text())
    assert result["targets"].keys() <= result.keys()
    ratio = result["tokens_per_s_together"] / result["tokens_per_s_alone"]
    assert 0.5 * ratio < result["throughput_ratio"] < 2 * ratio
    assert 0 < result["overhead_alone_ms"] < 1000 * 3 / result["tokens_per_s_alone"]
    assert result["second_turn_prompt_tokens"] > result["second_turn_cached_tokens"] > 0
    assert bench_engine.main(["--checkpoint", "/nowhere"]) == 2
