"""The plan of a run against the run: products of every stage, bytes on disk, refusals."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mgvq_quantizer import cli, codebook, forecast, pipeline
from mgvq_quantizer.assumed_data import expected_data
from mgvq_quantizer.calibration import CalibrationError
from mgvq_quantizer.machine_speed import Speed
from mgvq_quantizer.recipe import QuantRecipe
from mgvq_quantizer.report import Report
from mgvq_quantizer.stage_memory import StageMemory
from mgvq_quantizer.stage_work import Stages
from mgvq_quantizer.stream import Stream
from mgvq_runtime.checkpoint.reader import open_checkpoint
from mgvq_runtime.errors import CheckpointError, ConfigError
from tests.quantizer.conftest import QUICK
from tests.quantizer.test_solver_work import Products
from tests.runtime.models.published import PUBLISHED

RECIPE = QuantRecipe(**{**QUICK, "guided": True, "codebook_iterations": 1})


@pytest.fixture
def quick_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of known speed: one GMAC/s, one nanosecond a unit of the rest."""

    class Known(dict[str, float]):
        def __missing__(self, _: str) -> float:
            return 1e-9

    def measure(*_: Any) -> Speed:
        return Speed(Known(forward=1e-9), 1.0, "cpu", 1)

    monkeypatch.setattr(forecast, "measure_speed", measure)


def write_config(folder: Path, name: str = "Qwen2-VL-7B", **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**PUBLISHED[name], **changes}))
    return folder


def planned_macs(folder: Path, recipe: QuantRecipe) -> dict[str, int]:
    planned = forecast.forecast(folder, recipe)
    return {stage.name: stage.macs for stage in planned.stages}


@pytest.mark.slow
def test_every_stage_does_the_products_that_are_counted(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_clock: None
) -> None:
    monkeypatch.setattr(codebook.ops, "has_numba", lambda: False)
    real: Counter[str] = Counter()

    def count(owner: Any, name: str, stage: str) -> None:
        function = getattr(owner, name)

        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            with Products() as products:
                result = function(*args, **kwargs)
            real[stage] += products.macs
            return result

        monkeypatch.setattr(owner, name, counted)

    count(pipeline, "ask_teacher", "ask the dense model")
    count(pipeline, "encode_pictures", "encode")
    count(pipeline, "squared_gradients", "gradients")
    count(Stream, "share_books", "shared tables")
    count(Stream, "vision", "vision rounding")
    count(Stream, "embedding", "embedding")
    count(Stream, "decoder", "decoder rounding")
    count(pipeline.tuning, "tune", "tuning")
    pipeline.quantize(dense, tmp_path / "out", RECIPE, show_progress=False)
    encoded = real.pop("encode") // 2  # once before, once after the tower is quantized
    real["ask the dense model"] += encoded
    real["vision rounding"] += encoded
    planned = planned_macs(dense, RECIPE)
    assert planned.pop("write") == 0
    assert planned.keys() == real.keys()
    for stage, macs in planned.items():
        # More, as refits on these small moments may stop before their last step.
        assert 0.98 * real[stage] < macs < 1.3 * real[stage], stage


def test_bytes_are_those_that_a_run_writes(
    dense: Path, quantized: tuple[Path, Report], quick_clock: None
) -> None:
    planned = forecast.forecast(dense, QuantRecipe(**QUICK))
    written = open_checkpoint(quantized[0])
    tensors = sum(file.places[name].size for name, file in written.files.items())
    beside = sum(file.stat().st_size for file in pipeline.companions(dense))
    assert planned.checkpoint_bytes == tensors + beside
    for group, counted in quantized[1].groups.items():
        assert planned.bits_per_weight[group] == pytest.approx(counted.bits_per_weight)
    assert planned.calibration["assumed"] == ""
    assert planned.calibration["conversations"] == 5
    assert planned.calibration["heldout"] == 1


def test_a_large_model_is_planned_from_its_config_alone(
    tmp_path: Path, quick_clock: None, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_config(tmp_path / "7b")
    assert cli.main(["--model", str(folder), "--plan", "--json", "--device", "cpu"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["parameters"] == 8_291_375_616
    assert planned["bits_per_weight"]["decoder"] == pytest.approx(2.25, abs=0.001)
    assert "512 conversations" in planned["calibration"]["assumed"]
    assert "391 tokens" in planned["calibration"]["assumed"]
    stages = {stage["name"]: stage for stage in planned["stages"]}
    assert list(stages)[:3] == ["ask the dense model", "gradients", "survey"]
    # By hand: weights of the decoder's blocks, each token of 512 + 4 * 448 conversations once.
    blocks = 28 * (4608 * 3584 + 3584 * 3584 + 3 * 18944 * 3584)
    tokens = (512 + 4 * 448) * 591
    assert blocks * tokens < stages["ask the dense model"]["macs"] < 1.2 * blocks * tokens
    assert planned["seconds"] == pytest.approx(sum(s["seconds"] for s in planned["stages"]))
    assert planned["peak_bytes"] > 4 * planned["parameters"]
    assert cli.main(["--model", str(folder), "--plan", "--preset", "fast", "--device", "cpu"]) == 0
    table = capsys.readouterr().out
    assert "assumed: 448 + 64 held out" in table
    assert "decoder 2.250" in table


@pytest.mark.parametrize("name", ["LLaVA-OneVision-0.5B", "InternVL2-1B"])
def test_other_families_are_planned_too(tmp_path: Path, name: str, quick_clock: None) -> None:
    folder = write_config(tmp_path / "model", name)
    planned = forecast.forecast(folder, QuantRecipe(bits=2, allocation="uniform"))
    assert planned.seconds > 0
    assert {"vision rounding", "decoder rounding"} <= {stage.name for stage in planned.stages}


def test_every_setting_that_makes_work_makes_more(dense: Path, quick_clock: None) -> None:
    plain = planned_macs(dense, QuantRecipe(**QUICK))
    changed = {
        "refit_rounds": 2,
        "descent_sweeps": 2,
        "codebook_iterations": 9,
        "two_sided": True,
        "gradient_shift": True,
        "mismatch": 0.5,
    }
    for name, value in changed.items():
        recipe = dataclasses.replace(QuantRecipe(**QUICK), **{name: value})
        more = planned_macs(dense, recipe)
        assert more["decoder rounding"] + more["shared tables"] > 1.02 * (
            plain["decoder rounding"] + plain["shared tables"]
        ), name
    for name, value in {"tuning_steps": 40, "tuning_batch_tokens": 999}.items():
        recipe = dataclasses.replace(QuantRecipe(**QUICK), **{name: value})
        assert planned_macs(dense, recipe)["tuning"] > plain["tuning"], name


def test_what_a_run_would_refuse_is_refused(
    dense: Path, quantized: tuple[Path, Report], tmp_path: Path, quick_clock: None
) -> None:
    recipe = QuantRecipe()
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        forecast.forecast(tmp_path / "empty", recipe)
    with pytest.raises(CheckpointError, match="does not exist"):
        forecast.forecast(tmp_path / "nowhere", recipe)
    with pytest.raises(CheckpointError, match="quantized already"):
        forecast.forecast(quantized[0], recipe)
    unknown = write_config(tmp_path / "unknown", architectures=["GPT2LMHeadModel"])
    with pytest.raises(ConfigError, match="'GPT2LMHeadModel' is not supported"):
        forecast.forecast(unknown, recipe)
    folder = write_config(tmp_path / "7b")
    with pytest.raises(ConfigError, match="bits a weight at the least"):
        forecast.forecast(folder, QuantRecipe(bits=1.0))
    with pytest.raises(CalibrationError, match="does not exist"):
        forecast.forecast(dense, QuantRecipe(**QUICK), tmp_path / "none.jsonl")


def test_the_command_wants_an_output_or_a_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for flags, problem in (([], "required: --output"), (["--output", "x", "--json"], "--plan")):
        with pytest.raises(SystemExit):
            cli.main(["--model", str(tmp_path), *flags])
        assert problem in capsys.readouterr().err


def test_memory_grows_with_what_is_held(tmp_path: Path) -> None:
    source = forecast._open(write_config(tmp_path / "7b"))
    graph = forecast._graph(source)
    recipe = QuantRecipe(bits=2, allocation="uniform", max_samples=64)
    plans = forecast.expected_plans(graph, recipe)
    peaks = {}
    for steps in (0, 10):
        changed = dataclasses.replace(recipe, tuning_steps=steps)
        data, _ = expected_data(source, graph, changed, None)
        size = forecast.tensor_bytes(graph, plans)
        peaks[steps] = StageMemory(Stages(graph, plans, changed, data), size).tune()
    weights = sum(p.layout.num_weights for n, p in plans.items() if not n.startswith("visual."))
    assert peaks[10] - peaks[0] >= 3 * 4 * weights  # the decoded model, with a graph behind it
