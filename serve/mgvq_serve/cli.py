"""`mgvq-serve`: load a model, answer requests until told to stop (the console command).

Flags come from the fields of `EngineConfig` and `ServerSettings`; nothing is configured here.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from mgvq_runtime import EngineConfig, add_config_arguments, config_from_arguments
from mgvq_runtime.errors import ConfigError, MgvqError
from mgvq_serve.settings import (
    ServerSettings,
    add_settings_arguments,
    settings_from_arguments,
)

if TYPE_CHECKING:
    from mgvq_runtime import Engine

DEMO_MODEL_NAME = "mgvq-demo"
EXIT_INTERRUPTED = 130
MAX_PORT = 2**16 - 1


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `mgvq-serve`."""
    parser = argparse.ArgumentParser(
        prog="mgvq-serve",
        description="Serve a vision-language model with an OpenAI-compatible API and a chat page.",
        allow_abbrev=False,
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: local)")
    parser.add_argument(
        "--port", type=int, default=8000, help="port (default: 8000; 0: a free one)"
    )
    add_settings_arguments(parser, [field.name for field in fields(ServerSettings)])
    add_config_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the server.

    Returns:
        The exit status: 0 after SIGTERM; 1 for what the user can put right or an engine that
        failed, once everybody has been told; 130 after Ctrl-C.
    """
    arguments = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(name)s: %(message)s")
    try:
        settings = settings_from_arguments(arguments)
        config = config_from_arguments(arguments)
        if not 0 <= arguments.port <= MAX_PORT:
            raise ConfigError(f"--port must be from 0 to {MAX_PORT}, got {arguments.port}")
        engine = _load(config)
    except MgvqError as error:
        print(f"mgvq-serve: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return _serve(engine, config, settings, arguments.host, arguments.port)


def _load(config: EngineConfig) -> Engine:
    from mgvq_runtime import Engine

    if config.checkpoint is None:
        print("No --checkpoint given: serving the bundled demonstration model.", flush=True)
    else:
        print(f"Loading {config.checkpoint} ...", flush=True)
    engine = Engine.from_checkpoint(config.checkpoint, config)
    if engine.memory_plan is not None:
        print("\n".join(engine.memory_plan.lines()), flush=True)
    return engine


def _serve(
    engine: Engine, config: EngineConfig, settings: ServerSettings, host: str, port: int
) -> int:
    from mgvq_runtime import demo_picture_paths
    from mgvq_serve.app import create_app
    from mgvq_serve.server import Server

    name = settings.served_model_name or model_name(config.checkpoint)
    app = create_app(
        engine,
        settings,
        model_name=name,
        max_num_seqs=config.max_num_seqs,
        pictures=demo_picture_paths(),
    )

    def announce(url: str) -> None:
        print(f"Model {name!r} is ready. Chat page: {url}/   API: {url}/v1", flush=True)

    if threading.current_thread() is threading.main_thread():
        # uvicorn stops on SIGTERM and then raises it once more: by then there is nothing left to do
        signal.signal(signal.SIGTERM, lambda *_: None)
    server = Server(app, host, port, settings.drain_timeout, announce)
    app.service.engine.on_failure = server.stop_soon
    try:
        server.run()
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    finally:
        app.service.engine.stop()
    return 1 if app.service.engine.has_failed else 0


def model_name(checkpoint: str | None) -> str:
    """Return the name on the wire of a checkpoint folder, or of the bundled model."""
    if checkpoint is None:
        return DEMO_MODEL_NAME
    return Path(checkpoint).resolve().name or DEMO_MODEL_NAME


if __name__ == "__main__":
    sys.exit(main())
