"""`mgvq-bench kernels --static`: one kernel for one GPU, and what is refused."""

from __future__ import annotations

import json

import pytest

from mgvq_kernels import cli

pytest.importorskip("triton", reason="triton has no wheel for this platform")


def test_the_last_line_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["kernels", "--static", "--json", "--kernel", "arrange", "--arch", "86"]
    assert cli.main(arguments) == 0
    (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])["kernels"]
    assert row["kernel"].startswith("arrange")
    assert row["arch"] == "sm_86"
    assert 0 < row["registers"] <= 255
    assert (row["stack"], row["spills"]) == (0, 0)
    assert row["shared_bytes"] <= 99 * 1024


def test_a_table_names_every_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["kernels", "--static", "--kernel", "vq_gemv-fp16-d4", "--arch", "80"]) == 0
    head, line = capsys.readouterr().out.splitlines()
    assert head.split() == [
        "kernel", "arch", "registers", "shared", "stack", "spills", "instr/weight",
    ]  # fmt: skip
    assert line.split()[0].startswith("vq_gemv-fp16-d4")
    assert 0.5 < float(line.split()[-1]) < 5, "codes are looked up, not multiplied out"


@pytest.mark.parametrize("arguments", [["kernels"], [], ["kernels", "--static", "--arch", "75"]])
def test_what_is_missing_is_named(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(arguments)
    assert "error:" in capsys.readouterr().err
