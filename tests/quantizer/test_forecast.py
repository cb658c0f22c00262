"""The plan of a run against the run: products of every stage, bytes on disk, refusals."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mgvq_quantizer import (
    cli,
    codebook,
    expected_layout,
    forecast,
    machine_speed,
    pipeline,
    planning,
)
from mgvq_quantizer.assumed_data import expected_data
from mgvq_quantizer.calibration import CalibrationError
from mgvq_quantizer.expected_layout import expected_plans
from mgvq_quantizer.machine_speed import Speed
from mgvq_quantizer.preflight import stored_bytes
from mgvq_quantizer.recipe import QuantRecipe
from mgvq_quantizer.report import Report
from mgvq_quantizer.stage_memory import StageMemory
from mgvq_quantizer.stage_work import Stages
from mgvq_quantizer.stream import Stream
from mgvq_runtime.checkpoint.reader import open_checkpoint
from mgvq_runtime.errors import CheckpointError, ConfigError
from tests.quantizer.conftest import QUICK, picture
from tests.quantizer.test_solver_work import Paths, Products, never_settle
from tests.runtime.models.decoders import decoder_config
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


class Counted:
    """The multiply-adds of some functions, by stage."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(codebook.ops, "has_numba", lambda: False)
        never_settle(monkeypatch)
        self.real: Counter[str] = Counter()
        self._monkeypatch = monkeypatch

    def count(self, owner: Any, name: str, stage: str, paths: Paths | None = None) -> None:
        function = getattr(owner, name)

        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            before = paths.real.total() if paths else 0
            with Products() as products:
                result = function(*args, **kwargs)
            searched = paths.real.total() - before if paths else 0
            self.real[stage] += products.macs + searched
            return result

        self._monkeypatch.setattr(owner, name, counted)


@pytest.mark.slow
def test_every_stage_does_the_products_that_are_counted(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_clock: None
) -> None:
    kept = "visual.patch_embed.proj, visual.blocks.0.*, *.gate_up_proj"
    recipe = dataclasses.replace(RECIPE, keep=kept, block_steps=2, tuning_steps=2, max_pictures=2)
    counted = Counted(monkeypatch)
    counted.count(pipeline, "ask_teacher", "ask the dense model")
    counted.count(pipeline, "encode_pictures", "encode")
    counted.count(planning, "squared_gradients", "gradients")
    counted.count(Stream, "share_books", "shared tables")
    counted.count(Stream, "vision", "vision rounding")
    counted.count(Stream, "embedding", "embedding")
    counted.count(Stream, "decoder", "decoder rounding")
    counted.count(pipeline.tuning, "tune", "tuning")
    pipeline.quantize(dense, tmp_path / "out", recipe, show_progress=False)
    real = counted.real
    encoded = real.pop("encode") // 2  # once before, once after the tower is quantized
    real["ask the dense model"] += encoded
    real["vision rounding"] += encoded
    planned = planned_macs(dense, recipe)
    assert planned.pop("write") == 0
    assert planned.keys() == real.keys()
    for stage, macs in planned.items():
        assert macs == pytest.approx(real[stage], rel=0.05), stage


@pytest.mark.slow
def test_a_survey_does_the_products_that_are_counted(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_clock: None
) -> None:
    """Of one matrix a block: blocks behind it count, not those in front."""
    kept = "visual.*, model.embed_tokens, *.gate_up_proj, *.down_proj, *.o_proj"
    recipe = dataclasses.replace(RECIPE, allocation="model", bits=2.5, keep=kept, tuning_steps=0)
    counted = Counted(monkeypatch)
    counted.count(planning, "survey", "survey")
    monkeypatch.setattr(
        expected_layout, "choose_bands", lambda *_: {}
    )  # too narrow for several rates
    monkeypatch.setattr(planning, "choose_bands", lambda *_: {})
    pipeline.quantize(dense, tmp_path / "out", recipe, show_progress=False)
    planned = planned_macs(dense, recipe)
    assert planned["survey"] == pytest.approx(counted.real["survey"], rel=0.05)


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


def test_a_trellis_is_planned_as_it_is_run(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_clock: None
) -> None:
    """Stages and bytes; the states of the search are counted, and what it finds is drawn."""
    kept = "visual.patch_embed.proj, visual.blocks.0.*, *.gate_up_proj"
    settings = {"codec": "trellis", "window": 8, "keep": kept, "tuning_steps": 2}
    recipe = QuantRecipe(**{**QUICK, **settings})
    counted, paths = Counted(monkeypatch), Paths(monkeypatch)
    for name, stage in (("embedding", "embedding"), ("decoder", "decoder rounding")):
        counted.count(Stream, name, stage, paths)
    pipeline.quantize(dense, tmp_path / "out", recipe, show_progress=False)
    planned = forecast.forecast(dense, recipe)
    macs = {stage.name: stage.macs for stage in planned.stages}
    assert "shared tables" not in macs  # those of a trellis are not trained
    for stage, real in counted.real.items():
        assert macs[stage] == pytest.approx(real, rel=0.05), stage
    files = open_checkpoint(tmp_path / "out").files
    tensors = sum(file.places[name].size for name, file in files.items())
    beside = sum(file.stat().st_size for file in pipeline.companions(dense))
    assert planned.checkpoint_bytes == tensors + beside


def test_a_longer_window_of_a_large_model_takes_what_its_search_takes(
    tmp_path: Path, quick_clock: None
) -> None:
    folder = write_config(tmp_path / "7b")
    recipe = QuantRecipe(
        bits=2,
        allocation="uniform",
        codec="trellis",
        window=8,
        refit_rounds=4,
        descent_sweeps=2,
    )
    macs, longer = (
        planned_macs(folder, dataclasses.replace(recipe, window=window))["decoder rounding"]
        for window in (8, 9)
    )
    # By hand: four rounds of a rounding and two sweeps, with 256 states more at every weight. Some
    # come on top: where streams close, trials of orders, plain codewords.
    weights = 28 * (4608 * 3584 + 3584 * 3584 + 3 * 18944 * 3584)
    searched = 12 * weights * 256
    assert searched < longer - macs < 1.25 * searched


def test_entries_of_a_trellis_take_more_memory_than_its_codes(
    tmp_path: Path, quick_clock: None
) -> None:
    folder = write_config(tmp_path / "7b")
    peaks = []
    for codec in ("lookup", "trellis"):
        planned = forecast.forecast(folder, QuantRecipe(bits=2, allocation="uniform", codec=codec))
        peaks.append({stage.name: stage.peak_bytes for stage in planned.stages})
    # By hand: eight bytes, three times, for each of two weights that a lookup of 4 bits names.
    more = 3 * 8 * 152064 * 3584 // 2
    assert peaks[1]["embedding"] - peaks[0]["embedding"] == pytest.approx(more, rel=0.05)


@pytest.mark.parametrize("codec", ["lookup", "trellis"])
def test_every_kind_of_work_has_a_speed(
    codec: str, dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine_speed, "_ENOUGH_SECONDS", 0.0)
    monkeypatch.setattr(machine_speed, "_LEAST_RUNS", 1)
    monkeypatch.setattr(machine_speed, "_ROWS", 64)
    rates = {"bits": 2, "vision_bits": 2, "embedding_bits": 2}
    window = {"window": 8} if codec == "trellis" else {}
    recipe = QuantRecipe(**{**QUICK, **rates, "codec": codec, **window})
    planned = forecast.forecast(dense, recipe)
    assert planned.seconds > 0
    speeds = planned.machine["seconds_a_unit"]
    assert all(speed >= 0 for speed in speeds.values())
    searches = [kind for kind in speeds if kind.startswith("search")]
    assert all("bits" in kind for kind in searches) == (codec == "trellis")


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
    # By hand: the weights of the decoder's blocks, for each token of 512 conversations and of those
    # with other pictures that 60 batches hold; those of the tower, for each of 512 pictures.
    blocks = 28 * (4608 * 3584 + 3584 * 3584 + 3 * 18944 * 3584)
    tokens, patches = (512 + 60 * 3 * 4 // 5) * 591, 512 * 1564
    products = blocks * tokens + 32 * 12 * 1280**2 * patches
    assert products < stages["ask the dense model"]["macs"] < 1.1 * products
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
    least = QuantRecipe(**QUICK, mismatch=0.0)
    plain = planned_macs(dense, least)
    changed = {
        "refit_rounds": 2,
        "descent_sweeps": 2,
        "codebook_iterations": 9,
        "two_sided": True,
        "gradient_shift": True,
        "mismatch": 0.5,
    }
    for name, value in changed.items():
        recipe = dataclasses.replace(least, **{name: value})
        more = planned_macs(dense, recipe)
        assert more["decoder rounding"] + more["shared tables"] > 1.02 * (
            plain["decoder rounding"] + plain["shared tables"]
        ), name
    for name, value in {"tuning_steps": 40, "tuning_batch_tokens": 999}.items():
        recipe = dataclasses.replace(least, **{name: value})
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


def test_settings_of_a_run_may_be_planned_too(
    tmp_path: Path, quick_clock: None, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_config(tmp_path / "7b")
    flags = ["--model", str(folder), "--plan", "--json", "--device", "cpu", "--stream"]
    assert cli.main(flags) == 2
    assert "--tuning-steps 0" in capsys.readouterr().err
    more = ["--tuning-steps", "0", "--preset", "best", "--keep", "visual.*", "--block-steps", "3"]
    assert cli.main([*flags, *more]) == 0
    planned = json.loads(capsys.readouterr().out)
    stages = {stage["name"]: stage for stage in planned["stages"]}
    assert list(stages)[-2:] == ["held-out KL", "write"]
    assert "vision" not in planned["bits_per_weight"]
    one_block = 4 * (4608 * 3584 + 3584 * 3584 + 3 * 18944 * 3584)
    tables = 4 * 3 * 152064 * 3584  # token table, head, and the head that is kept to compare with
    rest = 512 * 591 * 4 * 3584 + tables + 6 * one_block + 2**32
    assert stages["ask the dense model"]["peak_bytes"] < rest < 4 * planned["parameters"]
    with_whole = forecast.forecast(folder, QuantRecipe(tuning_steps=0))
    peaks = {stage.name: stage.peak_bytes for stage in with_whole.stages}
    saved = peaks["gradients"] - stages["gradients"]["peak_bytes"]
    assert saved > 26 * one_block


def test_answers_that_the_model_gives_itself_are_planned_at_their_longest(
    dense: Path, tmp_path: Path, quick_clock: None, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "a.png").write_bytes(picture(0))
    flags = ["--model", str(dense), "--plan", "--calibration", str(pictures), "--device", "cpu"]
    flags += ["--bits", "2", "--allocation", "uniform", "--tuning-steps", "0"]
    assert cli.main(flags) == 0
    table = capsys.readouterr().out
    assert "4 answers are the model's own, counted with 64 tokens each, the most" in table
    planned = {}
    for by_block, more in ((False, []), (True, ["--stream"])):
        assert cli.main([*flags, "--json", *more]) == 0
        planned[by_block] = json.loads(capsys.readouterr().out)
    whole, streamed = planned[False], planned[True]
    assert whole["calibration"]["tokens"] - streamed["calibration"]["tokens"] == 4 * 63
    first = whole["stages"][0]
    assert (first["name"], streamed["stages"][0]["name"]) == ("own answers", "ask the dense model")
    # By hand: what a token is multiplied with in two blocks, and the head for each of 64.
    blocks = 2 * (64 * 128 + 64 * 64 + 3 * 64 * 128)
    tokens, head = whole["calibration"]["tokens"] - 4, 512 * 64
    products = tokens * blocks + 4 * 64 * head
    assert products < first["macs"] < 1.5 * products
    cache = 4 * tokens * 2 * 2 * 2 * 16  # float32 keys and values of two heads in two blocks
    assert first["peak_bytes"] > 4 * whole["parameters"] + cache


def test_text_that_cannot_be_read_is_assumed(tmp_path: Path, quick_clock: None) -> None:
    config = decoder_config("llama", vocab_size=512, num_hidden_layers=2)
    folder = tmp_path / "llama"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (tmp_path / "a.txt").write_text("text")
    recipe = QuantRecipe(**QUICK | {"max_samples": 8})
    planned = forecast.forecast(folder, recipe, tmp_path / "a.txt")
    assert planned.calibration["assumed"] == "8 passages of 512 tokens"
    assert planned.calibration["tokens"] == 8 * 512
    with pytest.raises(CalibrationError, match="does not exist"):
        forecast.forecast(folder, recipe, tmp_path / "b.txt")


def test_memory_grows_with_what_is_held(tmp_path: Path) -> None:
    source = forecast._open(write_config(tmp_path / "7b"))
    graph = forecast._graph(source)
    recipe = QuantRecipe(bits=2, allocation="uniform", max_samples=64)
    plans = expected_plans(graph, recipe)
    peaks = {}
    for steps in (0, 10):
        changed = dataclasses.replace(recipe, tuning_steps=steps)
        data, _ = expected_data(source, graph, changed, None)
        size = stored_bytes(graph, plans)
        peaks[steps] = StageMemory(Stages(graph, plans, changed, data), size).tune()
    weights = sum(p.layout.num_weights for n, p in plans.items() if not n.startswith("visual."))
    assert peaks[10] - peaks[0] >= 3 * 4 * weights  # the decoded model, with a graph behind it
