"""mgvq-chat: one question, a conversation, and every way to get it wrong."""

from __future__ import annotations

import io
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import mgvq_runtime
from mgvq_runtime import cli
from mgvq_runtime.engine.engine import Engine


@pytest.fixture
def arguments(tiny_qwen2_vl_folder: Path) -> list[str]:
    folder = str(tiny_qwen2_vl_folder)
    return [
        "--checkpoint",
        folder,
        "--device",
        "cpu",
        "--max-model-len",
        "512",
        "--max-tokens",
        "5",
    ]


@pytest.fixture
def png(tmp_path: Path) -> str:
    path = tmp_path / "red.png"
    Image.new("RGB", (56, 56), (255, 0, 0)).save(path)
    return str(path)


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))


def test_one_shot_prints_the_answer_alone(
    arguments: list[str], png: str, capsys: pytest.CaptureFixture[str], tiny_qwen2_vl_folder: Path
) -> None:
    assert cli.main([*arguments, "--image", png, "What is this?"]) == 0
    out = capsys.readouterr().out
    with mgvq_runtime.LLM(tiny_qwen2_vl_folder, device="cpu", max_model_len=512) as llm:
        message = cli._user_message([png], "What is this?")
        params = mgvq_runtime.SamplingParams(temperature=0.0, max_tokens=5)
        assert out == llm.chat([message], params).text + "\n"


def test_a_conversation_remembers_resets_and_quits(
    arguments: list[str], png: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    original = mgvq_runtime.LLM.stream

    def spy(self: Any, messages: Any, params: Any) -> Any:
        asked.append([(m["role"], len(m["content"])) for m in messages])
        return original(self, messages, params)

    monkeypatch.setattr(mgvq_runtime.LLM, "stream", spy)
    monkeypatch.setattr(cli, "_answer", _with_fixed_text(cli._answer))
    typed(
        monkeypatch, f"/image {png}", "What is it?", "", "And now?", "/reset", "New.", "/quit", "No"
    )
    assert cli.main(arguments) == 0
    assert asked == [
        [("user", 2)],
        [("user", 2), ("assistant", 6), ("user", 1)],
        [("user", 1)],
    ]


def test_a_picture_in_the_home_and_one_that_is_not_there(
    arguments: list[str],
    png: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What cannot be read is said when it is typed; the picture before it is kept."""
    asked: list[Any] = []

    def answer(llm: Any, params: Any, messages: Any) -> Any:
        assert capsys.readouterr().err.count("error: cannot read the picture") == 2
        asked.append([part["type"] for part in messages[-1]["content"]])
        return original(llm, params, messages)

    original = cli._answer
    monkeypatch.setattr(cli, "_answer", answer)
    monkeypatch.setenv("HOME", str(Path(png).parent))
    typed(
        monkeypatch, "/image ~/red.png", "/image ~/blue.png", "/image ~no-such-user/a.png", "What?"
    )
    assert cli.main(arguments) == 0
    assert asked == [["image_url", "text"]]
    assert "error" not in capsys.readouterr().err


def _with_fixed_text(original: Any) -> Any:
    def answer(*arguments: Any) -> Any:
        return "answer", original(*arguments)[1]

    return answer


def test_an_unknown_command_and_a_missing_picture_do_not_end_the_conversation(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed(monkeypatch, "/help", "/image /nowhere.png", "What is it?", "Hello")
    assert cli.main(arguments) == 0
    shown = capsys.readouterr()
    assert shown.err.count(cli.HELP) == 2
    assert "error: cannot read the picture /nowhere.png" in shown.err
    assert shown.out.count("\n") >= 1


def test_ctrl_c_stops_the_answer_and_not_the_program(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = Engine.step
    steps = []

    def step(self: Engine) -> Any:
        steps.append(1)
        if len(steps) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self)

    monkeypatch.setattr(Engine, "step", step)
    typed(monkeypatch, "First", "Second")
    before = signal.getsignal(signal.SIGINT)
    arguments[-1] = "50"
    assert cli.main(arguments) == 0
    assert signal.getsignal(signal.SIGINT) is before
    assert capsys.readouterr().err.count("[stopped]") == 1
    assert len(steps) > 3
    steps.clear()
    assert cli.main([*arguments, "Only one"]) == 130


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--checkpoint", "/nowhere"], "expected a folder"),
        (["--max-model-len", "99999"], "longer than the 2048 positions"),
        (["--temperature", "-1"], "temperature must be from 0"),
        (["--device", "abacus"], "device must be auto"),
        (["--image", "/nowhere.png"], "cannot read the picture"),
    ],
)
def test_what_the_user_can_put_right_exits_with_2(
    arguments: list[str], extra: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*arguments, *extra, "Question"]) == 2
    err = capsys.readouterr().err
    assert f"mgvq-chat: error: {message}" in err or message in err
    assert "Traceback" not in err


def test_abbreviations_and_unknown_flags_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("--check", "--nonsense"):
        with pytest.raises(SystemExit) as caught:
            cli.main([flag, "x", "y"])
        assert caught.value.code == 2
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert mgvq_runtime.__version__ in capsys.readouterr().out


def test_debugging_shows_the_traceback(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MGVQ_DEBUG", "1")
    with pytest.raises(mgvq_runtime.errors.CheckpointError):
        cli.main([*arguments, "--checkpoint", "/nowhere", "Question"])


@pytest.mark.parametrize("folder", ["/nowhere", None])
def test_a_bad_value_of_the_variable_stops_the_program(
    arguments: list[str],
    folder: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MGVQ_DEBUG", "maybe")
    extra = ["--checkpoint", folder] if folder else []
    assert cli.main([*arguments, *extra, "Question"]) == 2
    assert "mgvq-chat: error: environment variable MGVQ_DEBUG is 'maybe'" in capsys.readouterr().err
