"""Full disks, kills and two runs at once: what is finished stays, the end is the same bytes."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
from pathlib import Path

import pytest

from mgvq_quantizer import cli, planning
from mgvq_quantizer.pipeline import quantize
from mgvq_quantizer.recipe import QuantRecipe
from mgvq_quantizer.work_folder import ResumeError, WorkFolder
from mgvq_runtime.checkpoint.reader import open_checkpoint
from mgvq_runtime.checkpoint.writer import remove_leftovers
from mgvq_runtime.errors import CheckpointError
from tests.quantizer.conftest import SMALL
from tests.quantizer.stops import start, watch_files
from tests.quantizer.test_pipeline import contents

RECIPE = QuantRecipe(**SMALL)


@pytest.fixture(scope="module")
def whole(small: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The checkpoint of an undisturbed run, and the names of the files it wrote, in order."""
    output = tmp_path_factory.mktemp("whole") / "out"
    names: list[str] = []

    def note(name: str) -> bool:
        names.append(name)
        return False

    with pytest.MonkeyPatch.context() as patch:
        watch_files(patch, note, lambda: None)
        quantize(small, output, RECIPE, show_progress=False)
    return output, names


def command(small: Path, output: Path) -> list[str]:
    recipe = output.with_name("recipe.toml")
    values = {k: str(v).lower() if isinstance(v, bool) else repr(v) for k, v in SMALL.items()}
    recipe.write_text("".join(f"{key} = {value}\n" for key, value in values.items()))
    folders = ["--model", str(small), "--output", str(output), "--recipe", str(recipe)]
    return [*folders, "--device", "cpu", "--num-threads", "1"]


def test_every_file_passes_where_these_tests_stop(whole: tuple[Path, list[str]]) -> None:
    output, names = whole
    matrices = [name for name in names if name.endswith("proj.tmp")]
    assert {"run.tmp", "gradients.tmp", "model.embed_tokens.tmp"} < set(names)
    assert len(matrices) >= 5
    written = {file.name for file in output.iterdir()} - {"model.safetensors"} | {"shard-1"}
    assert written < set(names)
    assert names[-1] == output.parent.name  # the folder itself, after the rename


def test_a_disk_that_fills_at_any_file_loses_nothing(
    small: Path,
    whole: tuple[Path, list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Once at each file in turn, a fresh run going on from what the one before had finished."""
    waiting = whole[1][:-1]  # the folder's own flush may fail: some file systems have none
    output = tmp_path / "out"

    def fill() -> None:
        waiting.pop(0)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    watch_files(monkeypatch, lambda name: bool(waiting) and name == waiting[0], fill)
    arguments = command(small, output)
    attempts = 0
    while waiting:
        name = waiting[0]
        finished = len(list(tmp_path.glob("out.partial/*.safetensors")))
        assert cli.main(arguments) == 2
        attempts += 1
        said = capsys.readouterr().err
        expected = name.removesuffix(".tmp")
        assert f"the disk is full: {tmp_path}" in said
        assert f"/{expected}" in said
        assert "bytes cannot be written" in said
        assert "are free; free some space and run it again" in said
        left = {file.name for file in tmp_path.iterdir()}
        assert left <= {"out.partial", "recipe.toml"}, left
        assert not list(tmp_path.glob("out.partial/*.tmp"))
        assert len(list(tmp_path.glob("out.partial/*.safetensors"))) >= finished
    assert attempts == len(whole[1]) - 1
    assert cli.main(arguments) == 0
    assert contents(output) == contents(whole[0])
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("changed", ["template", "pixels", "device"])
def test_what_the_model_would_read_otherwise_is_refused(
    changed: str, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chat template, a preprocessor and a device decide the tensors as the recipe does."""
    source = shutil.copytree(small, tmp_path / "source")
    with monkeypatch.context() as stopping:
        watch_files(stopping, lambda name: name.startswith("model.layers"), stop)
        with pytest.raises(KeyboardInterrupt):
            quantize(source, tmp_path / "out", RECIPE, show_progress=False)
    name = "chat_template.json" if changed == "template" else "preprocessor_config.json"
    values = json.loads((source / name).read_text())
    if changed == "template":
        values["chat_template"] = "hello " + values["chat_template"]
    elif changed == "pixels":
        values["image_mean"] = [0.1, 0.1, 0.1]
    (source / name).write_text(json.dumps(values))
    if changed == "device":
        facts = json.loads((tmp_path / "out.partial" / "run.json").read_text())
        facts["device"] = "cuda"
        (tmp_path / "out.partial" / "run.json").write_text(json.dumps(facts))
    fact = "device" if changed == "device" else "calibration_tokens"
    said = "" if changed == "device" else ".*chat template, tokenizer or preprocessor"
    with pytest.raises(ResumeError, match=f"holds a run with {fact} = {said}"):
        quantize(source, tmp_path / "out", RECIPE, show_progress=False)


def stop() -> None:
    raise KeyboardInterrupt


def test_a_limit_of_the_system_on_files_is_met_like_a_full_disk(
    small: Path, whole: tuple[Path, list[str]], tmp_path: Path
) -> None:
    """No patch here: the kernel refuses first a matrix, then the checkpoint's tensors."""
    output, log = tmp_path / "out", tmp_path / "log"
    sizes = (whole[0] / "model.safetensors").stat().st_size
    for largest, name in ((6_000, ".safetensors"), (sizes - 1, "shard-1")):
        process = start(command(small, output), log, largest=largest)
        process.join()
        assert process.exitcode == 2, log.read_text()
        said = log.read_text()
        assert f"{name} of " in said
        assert "bytes cannot be written: File too large" in said
        assert not output.exists()
        assert not list(tmp_path.glob(".out.*"))
    assert list(tmp_path.glob("out.partial/*.safetensors"))
    process = start(command(small, output), log)
    process.join()
    assert process.exitcode == 0, log.read_text()
    assert contents(output) == contents(whole[0])


def test_kills_at_random_moments_end_in_the_same_bytes(
    small: Path, whole: tuple[Path, list[str]], tmp_path: Path
) -> None:
    """In the middle of files of every stage, and at four moments of no stage."""
    rng = random.Random(20)
    names = [*whole[1][:-1], tmp_path.name]  # the last is the folder that the checkpoint joins
    first = names.index("shard-1")
    matrices, ends = names[2:first], names[first:-1]
    moments: list[str | float] = [
        "run.tmp",
        "gradients.tmp",
        *sorted(rng.sample(matrices, 2), key=matrices.index),
        *sorted(rng.sample(ends, 2), key=ends.index),
        names[-1],
    ]
    for place in (1, 3, 4, 6):
        moments.insert(place, rng.uniform(0.05, 0.4))
    output, log = tmp_path / "out", tmp_path / "log"
    arguments = command(small, output)
    for moment in moments:
        how = "kill_at" if isinstance(moment, str) else "kill_after"
        process = start(arguments, log, **{how: moment})
        process.join()
        assert process.exitcode in (-signal.SIGKILL, -signal.SIGPROF), (moment, log.read_text())
        assert output.exists() == (moment == names[-1])
        for unfinished in tmp_path.glob(".out.partial-*"):
            with pytest.raises(CheckpointError):
                open_checkpoint(unfinished)
    open_checkpoint(output).verify()
    assert contents(output) == contents(whole[0])
    assert cli.main(arguments) == 2  # it is there, and what is left of its making may go
    shutil.rmtree(output)
    assert cli.main(arguments) == 0
    assert contents(output) == contents(whole[0])
    assert {file.name for file in tmp_path.iterdir()} == {"out", "log", "recipe.toml"}


def test_what_an_output_that_exists_left_behind_may_be_deleted(small: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out.partial").mkdir()
    with pytest.raises(CheckpointError, match=r"out exists.*out\.partial may be deleted"):
        quantize(small, tmp_path / "out", RECIPE, show_progress=False)


def test_gradients_are_not_computed_twice(
    small: Path,
    whole: tuple[Path, list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WorkFolder, "save", interrupt)
        with pytest.raises(KeyboardInterrupt):
            quantize(small, output, RECIPE, show_progress=False)
    monkeypatch.setattr(planning, "squared_gradients", interrupt)
    quantize(small, output, RECIPE, show_progress=False)
    assert contents(output) == contents(whole[0])


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_second_run_in_the_folder_is_refused(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    with WorkFolder(tmp_path / "out.partial", {"a": 1}) as work:
        work.save_facts("b", {})
        assert cli.main(command(small, output)) == 2
        assert "another mgvq-quantize is at work in" in capsys.readouterr().err
        assert work.load_facts("b") == {}
    with pytest.raises(ResumeError, match="a = 1, this one has 2"):
        WorkFolder(tmp_path / "out.partial", {"a": 2})
    with WorkFolder(tmp_path / "out.partial", {"a": 1}):  # nobody holds it any more
        pass


def test_a_folder_without_finished_work_is_taken_over_and_left_clean(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "run"
    with WorkFolder(path, {"a": 1}):
        assert (path / "run.json").exists()
    assert not path.exists()
    path.mkdir()
    (path / "lock").touch()
    (path / "run.tmp").write_text('{"a')  # killed before it had written what it is
    with WorkFolder(path, {"a": 2}) as work:
        work.save_facts("b", {})
    assert path.exists()
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be written: Not a directory"):
        WorkFolder(tmp_path / "file" / "run", {})


def test_leftovers_of_other_checkpoints_stay(tmp_path: Path) -> None:
    for name in (".a.partial-1", ".ab.partial-1", ".[a].partial-1", "a"):
        (tmp_path / name).mkdir()
    remove_leftovers(tmp_path / "a")
    remove_leftovers(tmp_path / "[a]")
    assert sorted(file.name for file in tmp_path.iterdir()) == [".ab.partial-1", "a"]
