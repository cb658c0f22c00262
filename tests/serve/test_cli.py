"""The console command: flags, refusals, signals."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import httpx
import pytest

import mgvq_serve
from mgvq_runtime import EngineConfig
from mgvq_runtime.errors import ConfigError
from mgvq_serve.cli import build_parser, main, model_name
from mgvq_serve.settings import ServerSettings

ROOT = Path(__file__).parents[2]

SERVE_FAKE_ENGINE = """
import sys
from mgvq_runtime import EngineConfig
from mgvq_serve import cli
from mgvq_serve.settings import ServerSettings
from tests.serve.fake_engine import FakeEngine
sys.exit(cli._serve(FakeEngine(), EngineConfig(), ServerSettings(drain_timeout=1), "127.0.0.1", 0))
"""


def test_help_has_every_setting() -> None:
    text = build_parser().format_help()
    for config_class in (ServerSettings, EngineConfig):
        for field in fields(config_class):
            assert "--" + field.name.replace("_", "-") in text


def test_defaults_are_those_of_the_settings() -> None:
    arguments = build_parser().parse_args([])
    values = {field.name: getattr(arguments, field.name) for field in fields(ServerSettings)}
    assert ServerSettings(**values) == ServerSettings()


def test_flags_have_their_types() -> None:
    given = ["--max-queue", "3", "--max-body-mb", "0.5", "--allowed-local-media-path", "/tmp"]
    arguments = build_parser().parse_args(given)
    assert (arguments.max_queue, arguments.max_body_mb) == (3, 0.5)
    assert arguments.allowed_local_media_path == Path("/tmp")


def test_flags_may_not_be_abbreviated() -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["--max-que", "3"])


@pytest.mark.parametrize(
    "values",
    [
        {"max_queue": -1},
        {"limit_images": -1},
        {"max_body_mb": 0},
        {"max_body_mb": float("inf")},
        {"max_image_mb": float("nan")},
        {"max_image_mb": 1e30},
        {"request_timeout": float("inf")},
        {"request_timeout": 1e30},
        {"sse_ping_interval": float("nan")},
        {"drain_timeout": float("inf")},
        {"sse_ping_interval": -1},
        {"drain_timeout": -1},
        {"media_threads": 0},
        {"api_key": " "},
        {"max_image_pixels": 178_956_971},
        {"allowed_local_media_path": Path("/nowhere/at/all")},
    ],
)
def test_settings_that_make_no_sense(values: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        ServerSettings(**values)


def test_a_checkpoint_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "no-model"
    assert main(["--checkpoint", str(missing)]) == 1
    message = capsys.readouterr().err
    assert message.startswith("mgvq-serve: ")
    assert "no-model" in message


def test_bad_settings_end_before_loading(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--max-queue", "-2", "--checkpoint", "/nowhere"]) == 1
    assert "max_queue" in capsys.readouterr().err


@pytest.mark.parametrize("port", ["-1", "65536", "99999"])
def test_a_port_that_cannot_be_ends_before_loading(
    capsys: pytest.CaptureFixture[str], port: str
) -> None:
    assert main(["--port", port, "--checkpoint", "/nowhere"]) == 1
    assert f"--port must be from 0 to 65535, got {port}" in capsys.readouterr().err


def test_model_name() -> None:
    assert model_name(None) == "mgvq-demo"
    assert model_name("some/where/qwen-2bit/") == "qwen-2bit"


def test_front_door_is_what_it_says() -> None:
    assert dir(mgvq_serve) == sorted(mgvq_serve.__all__)
    assert mgvq_serve.main is main
    with pytest.raises(AttributeError):
        _ = mgvq_serve.nothing


def test_importing_loads_no_web_framework() -> None:
    code = "import sys, mgvq_serve, mgvq_serve.cli; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"fastapi", "uvicorn", "starlette", "torch"} & set(done.stdout.split())


def start(program: str) -> subprocess.Popen[str]:
    """Start a server in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a shell that runs the tests in the background has told its children to ignore Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_signals_stop_the_server_cleanly(number: signal.Signals, status: int) -> None:
    with start(SERVE_FAKE_ENGINE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        line = process.stdout.readline()
        assert re.search(r"Chat page: http://127\.0\.0\.1:\d+/ ", line), process.stderr.read()
        process.send_signal(number)
        assert process.wait(20) == status
        assert "Traceback" not in process.stderr.read()


def test_an_engine_that_fails_ends_the_server_once_its_clients_know() -> None:
    setup = "FakeEngine.step = lambda engine: 1 / 0\nsys.exit("
    with start(SERVE_FAKE_ENGINE.replace("sys.exit(", setup)) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        found = re.search(r"API: (\S+)", process.stdout.readline())
        assert found, process.stderr.read()
        body = {"model": "mgvq-demo", "messages": [{"role": "user", "content": "hello"}]}
        try:
            reply = httpx.post(f"{found[1]}/chat/completions", json=body, timeout=20)
            assert process.wait(20) == 1
        finally:
            process.kill()
        assert reply.status_code == 503
        assert reply.json()["error"]["code"] == "engine_dead"
