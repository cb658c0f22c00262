"""Bands by sensitivity through the whole pipeline: bits in full, resume, report, an answer."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

from mgvq_quantizer import planning, survey
from mgvq_quantizer.pipeline import quantize
from mgvq_quantizer.recipe import QuantRecipe
from mgvq_quantizer.report import Report
from mgvq_quantizer.stream import Stream
from mgvq_quantizer.work_folder import ResumeError, WorkFolder
from mgvq_runtime.checkpoint.bits import count_bits
from mgvq_runtime.checkpoint.reader import open_checkpoint
from mgvq_runtime.models.loading import load_model
from tests.quantizer.conftest import QUICK
from tests.quantizer.test_pipeline import contents
from tests.runtime.conftest import write_hub_folder

RECIPE = QuantRecipe(**{**QUICK, "allocation": "model", "bits": 3.5, "guided": True})
SHAPE = {"hidden_size": 128, "intermediate_size": 256}


@pytest.fixture(scope="module")
def wide(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense folder with matrices wide enough for bands."""
    folder = tmp_path_factory.mktemp("wide")
    write_hub_folder(
        folder, seed=1, **SHAPE, rope_scaling={"type": "mrope", "mrope_section": [4, 6, 6]}
    )
    for name in ("calibration.zip", "questions.zip"):
        shutil.copy(dense / name, folder)
    return folder


@pytest.fixture(scope="module")
def mixed(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    output = tmp_path_factory.mktemp("mixed") / "checkpoint"
    return output, quantize(wide, output, RECIPE, show_progress=False)


def test_the_checkpoint_costs_what_was_asked_and_mixes_rates(mixed: tuple[Path, Report]) -> None:
    quantization = open_checkpoint(mixed[0]).quantization
    assert quantization is not None
    count = count_bits(quantization.matrices)["decoder"]
    assert 3.3 < count.bits_per_weight <= 3.5
    assert mixed[1].groups["decoder"].bits_per_weight == pytest.approx(count.bits_per_weight)
    layouts = [m.layout for n, m in quantization.matrices.items() if n.startswith("model.layers.")]
    assert len({band.rate for layout in layouts for band in layout.bands}) > 1
    assert max(len(layout.bands) for layout in layouts) > 1
    model = load_model(mixed[0])
    assert model.config.text_config.hidden_size == 128


def test_interrupted_anywhere_it_goes_on_to_the_same_bytes(
    wide: Path, mixed: tuple[Path, Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once in the survey, once among the matrices."""
    steps: list[str] = []
    saved = {"save_facts": 3, "save": 9}

    def stopping(method: str) -> None:
        original = getattr(WorkFolder, method)

        def stop_after(self: WorkFolder, name: str, value: object) -> None:
            original(self, name, value)
            steps.append(name)
            if (
                sum(step.startswith("sensitivity") == (method != "save") for step in steps)
                == saved[method]
            ):
                raise KeyboardInterrupt

        monkeypatch.setattr(WorkFolder, method, stop_after)

    stopping("save_facts")
    stopping("save")
    output = tmp_path / "checkpoint"
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            quantize(wide, output, RECIPE, show_progress=False)
    quantize(wide, output, RECIPE, show_progress=False)
    assert len(steps) == len(set(steps))
    assert contents(output) == contents(mixed[0])


def test_runs_share_what_their_settings_leave_as_it_is(
    wide: Path, mixed: tuple[Path, Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First the survey, in another allocation; then the matrices, tuned otherwise."""
    shared = tmp_path / "shared"

    def run(name: str, **changes: object) -> Path:
        recipe = dataclasses.replace(RECIPE, **changes)
        quantize(wide, tmp_path / name, recipe, show_progress=False, shared=shared)
        return tmp_path / name

    run("layer", allocation="layer", guided=False)
    monkeypatch.setattr(survey, "measure", lambda *_: pytest.fail("surveyed again"))
    assert contents(run("model")) == contents(mixed[0])
    monkeypatch.setattr(Stream, "_solve", lambda *_: pytest.fail("rounded again"))
    monkeypatch.setattr(planning, "squared_gradients", lambda *_: pytest.fail("not needed"))
    run("untuned", allocation="layer", guided=False, tuning_steps=0)
    assert not list(tmp_path.glob("*.partial"))


def test_damaged_facts_are_named(tmp_path: Path) -> None:
    with WorkFolder(tmp_path / "run", {}) as work:
        assert work.load_facts("a") is None
        work.save_facts("a", {"x": 0.1})
        assert work.load_facts("a") == {"x": 0.1}
        (tmp_path / "run" / "a.json").write_text('{"x": 0.')
        with pytest.raises(ResumeError, match=r"a\.json is damaged"):
            work.load_facts("a")
