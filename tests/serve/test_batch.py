"""mgvq-batch: each line gets one response, whatever is in it and however often it is broken off."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from openai.types.chat import ChatCompletion

from mgvq_runtime.errors import ConfigError, EngineDeadError
from mgvq_serve.batch import build_parser, main, run_batch
from mgvq_serve.batch_lines import BatchOutput
from mgvq_serve.settings import ServerSettings, settings_from_arguments
from tests.serve.conftest import MODEL, ask, data_url, image_part
from tests.serve.fake_engine import FakeEngine

ROOT = Path(__file__).parents[2]
CHAT = "/v1/chat/completions"
Record = dict[str, Any]


def request(custom_id: Any, body: Any, **changes: Any) -> str:
    line = {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body} | changes
    return json.dumps(line)


def write(path: Path, *lines: str | bytes) -> Path:
    raw = [line if isinstance(line, bytes) else line.encode() for line in lines]
    path.write_bytes(b"".join(line + b"\n" for line in raw))
    return path


def run(source: Path, target: Path, engine: Any = None, **settings: Any) -> tuple[int, int]:
    with BatchOutput(target) as output:
        return run_batch(
            engine or FakeEngine(), source, output, ServerSettings(**settings), MODEL, 3
        )


def records(target: Path) -> list[Record]:
    return [json.loads(line) for line in target.read_text().splitlines()]


def by_id(target: Path) -> dict[str, Record]:
    found = {record["custom_id"]: record for record in records(target)}
    assert len(found) == len(records(target)), "an id has two responses"
    return found


def content(record: Record) -> str:
    assert record["response"]["status_code"] == 200
    assert record["error"] is None
    reply = ChatCompletion.model_validate(record["response"]["body"])
    return reply.choices[0].message.content or ""


@pytest.fixture
def paths(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "in.jsonl", tmp_path / "out.jsonl"


def test_every_request_gets_its_own_answer(paths: tuple[Path, Path]) -> None:
    source, target = paths
    write(source, *[request(f"r{i}", ask(f"number {i}")) for i in range(20)], "  ", "")
    engine = FakeEngine()
    assert run(source, target, engine) == (20, 0)
    found = by_id(target)
    assert {key: content(record) for key, record in found.items()} == {
        f"r{i}": f"number {i}" for i in range(20)
    }
    assert len({record["id"] for record in found.values()}) == 20
    assert engine.most_running == 6, "two a place: one runs, one is prepared"
    assert engine.threads == {"mgvq-engine"}


def test_several_answers_pictures_and_forms(paths: tuple[Path, Path]) -> None:
    source, target = paths
    parts = [image_part(data_url()), {"type": "text", "text": "a b"}]
    picture = {"model": MODEL, "messages": [{"role": "user", "content": parts}]}
    many = [request(f"n{i}", ask("x y", n=8)) for i in range(9)]
    write(source, request("é", picture), *many, request("f", ask("z", guided_regex="z")))
    engine = FakeEngine()
    assert run(source, target, engine) == (11, 0)
    found = by_id(target)
    assert content(found["é"]) == "a b"
    assert found["é"]["response"]["body"]["usage"]["prompt_tokens"] == 8
    assert len(found["n3"]["response"]["body"]["choices"]) == 8
    forms = [r.sampling_params.structured_outputs for r in engine.requests]
    assert [form.regex for form in forms if form is not None] == ["z"]


FAILING = {
    "temperature": (ask(temperature=9), 400, "temperature"),
    "model": (ask(model="gpt-9"), 404, "model"),
    "stream": (ask(stream=True), 400, "stream"),
    "picture": (
        {"model": MODEL, "messages": [{"role": "user", "content": [image_part("data:x")]}]},
        400,
        "messages[0].content[0].image_url.url",
    ),
    "form": (ask(guided_regex="(wrong"), 400, "guided_regex"),
    "surrogate": (ask("\ud800"), 400, None),
    "long": (ask("word " * 600), 400, "messages"),
    "nan": (ask("nan"), 500, None),
    "trip": (ask("trip"), 500, None),
}


def test_a_request_that_fails_fails_alone(paths: tuple[Path, Path]) -> None:
    source, target = paths
    lines = [request(name, body) for name, (body, _, _) in FAILING.items()]
    write(source, *lines, request("fine", ask("fine")))
    assert run(source, target) == (1, len(FAILING))
    found = by_id(target)
    assert content(found["fine"]) == "fine"
    for name, (_, status, param) in FAILING.items():
        response = found[name]["response"]
        assert response["status_code"] == status, name
        assert response["body"] == {"error": found[name]["error"]}
        assert found[name]["error"]["param"] == param


BAD_LINES = {
    "not JSON": b"{",
    "no text at all": b"\xff\xfe",
    "deep": b"[" * 200_000,
    "a list": b"[]",
    "null": b"null",
    "no id": json.dumps({"method": "POST", "url": CHAT, "body": ask("x")}).encode(),
    "empty id": request("", ask("x")).encode(),
    "id a number": request(7, ask("x")).encode(),
    "GET": request("get", ask("x"), method="GET").encode(),
    "another url": request("url", ask("x"), url="/v1/embeddings").encode(),
    "body a list": request("body", []).encode(),
    "no body": json.dumps({"custom_id": "none", "method": "POST", "url": CHAT}).encode(),
    "an id again": request("first", ask("again")).encode(),
}


def test_a_line_that_is_no_request_gets_an_error_line(paths: tuple[Path, Path]) -> None:
    source, target = paths
    write(source, request("first", ask("hello")), *BAD_LINES.values())
    assert run(source, target) == (1, len(BAD_LINES))
    bad = {r["error"]["line"]: r for r in records(target) if r["response"] is None}
    assert sorted(bad) == list(range(2, 2 + len(BAD_LINES)))
    for number, name in enumerate(BAD_LINES, start=2):
        assert bad[number]["error"]["code"] == "invalid_line", name
        assert f"line {number}: " in bad[number]["error"]["message"]
    assert {r["custom_id"] for r in bad.values()} == {None, "get", "url", "body", "none"}
    assert run(source, target) == (0, 0), "all are answered"


def test_only_what_has_no_response_is_asked_again(paths: tuple[Path, Path]) -> None:
    source, target = paths
    write(source, *[request(f"r{i}", ask(f"number {i}")) for i in range(12)])
    assert run(source, target) == (12, 0)
    whole = target.read_bytes()
    kept = b"".join(whole.splitlines(keepends=True)[:5])
    for torn in (b"", b'{"i', whole[len(kept) : len(kept) + 90]):
        target.write_bytes(kept + torn)
        engine = FakeEngine()
        assert run(source, target, engine) == (7, 0)
        assert len(engine.requests) == 7
        assert target.read_bytes().startswith(kept)
        assert sorted(by_id(target)) == sorted(f"r{i}" for i in range(12))
    target.write_bytes(whole.rstrip(b"\n"))
    assert run(source, target) == (0, 0)
    assert target.read_bytes() == whole


@pytest.mark.parametrize("there", [b"my notes", b"my notes\n", b'{"a": 1}\n', b"[]\n", b"null\n"])
def test_a_file_of_something_else_is_not_touched(paths: tuple[Path, Path], there: bytes) -> None:
    paths[1].write_bytes(there)
    with pytest.raises(ConfigError, match="no response of a batch"):
        BatchOutput(paths[1])
    assert paths[1].read_bytes() == there


def test_an_engine_that_dies_leaves_no_response_behind(paths: tuple[Path, Path]) -> None:
    source, target = paths
    write(source, *[request(f"r{i}", ask("a b c d")) for i in range(9)])
    engine = FakeEngine()
    step = engine.step

    def dies_when_some_are_answered() -> Any:
        engine.fails_next_step = len(engine.requests) > 6
        return step()

    engine.step = dies_when_some_are_answered  # type: ignore[method-assign]
    with pytest.raises(EngineDeadError):
        run(source, target, engine)
    left = records(target)
    assert [content(record) for record in left] == ["a b c d"] * len(left)
    assert 1 <= len(left) < 9
    assert run(source, target) == (9 - len(left), 0)
    assert sorted(by_id(target)) == [f"r{i}" for i in range(9)]


SLOW = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
from pathlib import Path
from tests.serve.fake_engine import FakeEngine
from tests.serve.test_batch import run
print(run(Path(sys.argv[1]), Path(sys.argv[2]), FakeEngine(step_s=0.02)))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_killed_run_goes_on_where_it_was(paths: tuple[Path, Path], number: int) -> None:
    source, target = paths
    write(source, *[request(f"r{i}", ask(f"number {i} of many")) for i in range(120)])
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, str(source), str(target)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        stderr=subprocess.DEVNULL,
    )
    with process:
        assert wait_for(lambda: target.exists() and target.read_bytes().count(b"\n") >= 5)
        process.send_signal(number)
        assert process.wait(60) != 0
    before = target.read_bytes().count(b"\n")
    assert 5 <= before < 120
    answered, failed = run(source, target)
    assert (answered, failed) == (120 - before, 0)
    assert len(by_id(target)) == 120


def wait_for(claim: Callable[[], bool], timeout_s: float = 90.0) -> bool:
    end = time.monotonic() + timeout_s
    while not claim() and time.monotonic() < end:
        time.sleep(0.02)
    return claim()


def test_the_command_answers_with_a_model(
    tmp_path: Path, paths: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.runtime.conftest import write_hub_folder  # torch: not for the runs that are killed

    source, target = paths
    folder = tmp_path / "tiny"
    folder.mkdir()
    write_hub_folder(folder, seed=0)
    body = ask("hello", temperature=0, max_tokens=4) | {"model": "tiny"}
    form = body | {"structured_outputs": {"choice": ["yes", "no"]}}
    write(source, request("plain", body), request("form", form), request("bad", {}))
    files = ["-i", str(source), "-o", str(target)]
    flags = ["--checkpoint", str(folder), "--device", "cpu", "--max-model-len", "128"]
    assert main([*files, *flags]) == 0
    assert "2 answered, 1 failed" in capsys.readouterr().err
    found = by_id(target)
    assert found["plain"]["response"]["body"]["usage"]["completion_tokens"] <= 4
    assert content(found["form"]) in ("yes", "no")
    assert found["bad"]["error"]["param"] == "model"


def test_files_that_cannot_be_are_refused_before_loading(
    paths: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = paths
    assert main(["-i", str(source), "-o", str(target)]) == 1
    assert "is no file" in capsys.readouterr().err
    write(source, request("a", ask("a")))
    assert main(["-i", str(source), "-o", str(source)]) == 1
    assert "is the input file" in capsys.readouterr().err
    assert main(["-i", str(source), "-o", str(target / "no" / "folder")]) == 1
    with pytest.raises(SystemExit):
        build_parser().parse_args(["-i", "x"])


def test_limits_of_pictures_and_of_frames_are_flags() -> None:
    given = ["-i", "x", "-o", "y", "--limit-images", "3", "--limit-frames", "100"]
    settings = settings_from_arguments(build_parser().parse_args(given))
    assert (settings.limit_images, settings.limit_frames) == (3, 100)
