"""Peak memory of a run with all blocks in memory and of one with a block at a time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.quantizer.deep_llama import write_deep_llama
from tests.quantizer.test_pipeline import contents

SHAPE = {
    "hidden_size": 508,  # no multiple of 8: all but a small matrix a block stays dense, so that
    "intermediate_size": 2044,  # the time goes into walking and not into rounding
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
RUNS = {"small": (2, "stream"), "stream": (16, "stream"), "resident": (16, "resident")}


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
def test_a_run_by_block_stays_where_a_resident_one_grows(tmp_path: Path) -> None:
    """The run of two blocks stands for imports and compiled code, which come as the run goes on."""
    weights, peaks = {}, {}
    for layers in (2, 16):
        folder = tmp_path / str(layers)
        weights[layers] = 4 * write_deep_llama(folder, layers, SHAPE, torch.float16)
    for name, (layers, way) in RUNS.items():
        command = [sys.executable, "-m", "tests.quantizer.deep_llama"]
        arguments = [str(tmp_path / str(layers)), str(tmp_path / name), way]
        # Freed blocks go back at once. Else glibc keeps 0 to 100 MiB of them, a drawn amount.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576"}
        words = [*command, *arguments]
        done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr
        peaks[name] = int(done.stdout)
    print({name: f"{peak / 2**20:.0f} MiB" for name, peak in peaks.items()}, weights)
    more = weights[16] - weights[2]
    assert peaks["stream"] < peaks["small"] + more / 2 < peaks["resident"] - more / 4
    assert contents(tmp_path / "stream") == contents(tmp_path / "resident")
