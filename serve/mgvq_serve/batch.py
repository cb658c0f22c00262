"""`mgvq-batch`: answer a file of chat requests in OpenAI's batch format (the console command).

Every line goes through the same checks and the same engine thread as a request over HTTP, without
the HTTP. A response is written as soon as it is there, so the order is that of completion; run
again with the same files, only what has no response is asked. What lines look like is
`batch_lines`.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from mgvq_runtime import EngineConfig, add_config_arguments, config_from_arguments
from mgvq_runtime.errors import ConfigError, EngineDeadError, MgvqError
from mgvq_serve.batch_lines import (
    BadLineError,
    BatchLine,
    BatchOutput,
    Record,
    parse_line,
    read_lines,
)
from mgvq_serve.chat import ChatService
from mgvq_serve.cli import EXIT_INTERRUPTED, model_name
from mgvq_serve.errors import ApiError, internal_error
from mgvq_serve.protocol import MAX_CHOICES
from mgvq_serve.service import ServableEngine, build_service
from mgvq_serve.settings import (
    ServerSettings,
    add_settings_arguments,
    settings_from_arguments,
)

log = logging.getLogger("mgvq_serve")

SETTINGS = (
    "served_model_name",
    "limit_images",
    "limit_frames",
    "max_image_mb",
    "max_image_pixels",
    "allowed_local_media_path",
    "media_threads",
)
"""What of `ServerSettings` means something without a server."""
LINES_PER_PLACE = 2  # pictures of the next requests are prepared while the engine is busy


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `mgvq-batch`."""
    parser = argparse.ArgumentParser(
        prog="mgvq-batch",
        description="Answer a JSONL file of chat requests in OpenAI's batch format. Run again "
        "after an interruption, it goes on where it was.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "-i", "--input-file", type=Path, required=True, metavar="FILE", help="requests, one a line"
    )
    parser.add_argument(
        "-o",
        "--output-file",
        type=Path,
        required=True,
        metavar="FILE",
        help="responses; those that are there are kept, and their requests not asked again",
    )
    add_settings_arguments(parser, SETTINGS)
    add_config_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a batch.

    Returns:
        The exit status: 0 once every line has its response, be it an error; 1 for what the user can
        put right or an engine that failed; 130 after Ctrl-C.
    """
    arguments = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(name)s: %(message)s")
    try:
        settings = settings_from_arguments(arguments)
        config = config_from_arguments(arguments)
        check_files(arguments.input_file, arguments.output_file)
        with BatchOutput(arguments.output_file) as output:
            return _load_and_run(arguments.input_file, output, config, settings)
    except (MgvqError, OSError) as error:
        print(f"mgvq-batch: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("mgvq-batch: interrupted; run it again to go on", file=sys.stderr)
        return EXIT_INTERRUPTED


def check_files(source: Path, target: Path) -> None:
    """Refuse files that cannot be what they are given as, before a model is loaded.

    Raises:
        ConfigError: if the input is no file, or the output is the input.
    """
    if not source.is_file():
        raise ConfigError(f"--input-file {source} is no file")
    if target.exists() and target.samefile(source):
        raise ConfigError(f"--output-file {target} is the input file; choose another")


def run_batch(
    engine: ServableEngine,
    source: Path,
    output: BatchOutput,
    settings: ServerSettings,
    name: str,
    max_num_seqs: int,
) -> tuple[int, int]:
    """Answer every line that has no response yet.

    Args:
        engine: A loaded engine, idle.
        source: The requests.
        output: Where responses go.
        settings: Limits on pictures.
        name: Name of the model in the bodies.
        max_num_seqs: Requests the engine runs at the same time.

    Returns:
        How many lines were answered, and how many failed.

    Raises:
        EngineDeadError: if the engine fails; lines without a response have none then.
    """
    num_lines = LINES_PER_PLACE * max_num_seqs
    settings = replace(settings, max_queue=num_lines * MAX_CHOICES, request_timeout=0)
    service = build_service(engine, settings, name, max_num_seqs)
    return asyncio.run(_run(service, source, output, num_lines))


def _load_and_run(
    source: Path, output: BatchOutput, config: EngineConfig, settings: ServerSettings
) -> int:
    from mgvq_runtime import Engine

    engine = Engine.from_checkpoint(config.checkpoint, config)
    name = settings.served_model_name or model_name(config.checkpoint)
    answered, failed = run_batch(engine, source, output, settings, name, config.max_num_seqs)
    print(f"mgvq-batch: {answered} answered, {failed} failed", file=sys.stderr)
    return 0


async def _run(
    service: ChatService, source: Path, output: BatchOutput, num_workers: int
) -> tuple[int, int]:
    """Let workers take lines until there are none, or the engine has died."""
    outcomes: list[bool] = []
    service.engine.start(asyncio.get_running_loop())
    try:
        total = sum(1 for _ in read_lines(source))
        with tqdm(total=total, unit="request", disable=None) as progress:
            lines = _open_lines(source, output, progress)

            async def work() -> None:
                for line in lines:
                    record = await _respond(service, line)
                    if service.engine.is_dead:
                        return
                    output.write(record)
                    outcomes.append(record["error"] is None)
                    progress.update()

            async with asyncio.TaskGroup() as group:
                for _ in range(num_workers):
                    group.create_task(work())
        if service.engine.has_failed:
            raise EngineDeadError(
                "the engine failed; run it again to go on after the last response"
            )
    finally:
        await asyncio.to_thread(service.engine.stop)
        service.close()
    return sum(outcomes), len(outcomes) - sum(outcomes)


def _open_lines(
    source: Path, output: BatchOutput, progress: tqdm
) -> Iterator[BatchLine | BadLineError]:
    """Yield what has no response yet."""
    earlier, seen = frozenset(output.custom_ids), set[str]()
    for number, raw in read_lines(source):
        line: BatchLine | BadLineError
        try:
            line = parse_line(number, raw)
            is_done = line.custom_id in earlier
            if line.custom_id in seen:
                raise BadLineError(number, f"an earlier line has custom_id {line.custom_id!r}")
            seen.add(line.custom_id)
        except BadLineError as error:
            line, is_done = error, number in output.bad_lines
        if is_done:
            progress.update()
        else:
            yield line


async def _respond(service: ChatService, line: BatchLine | BadLineError) -> Record:
    """Return the response to one line."""
    if isinstance(line, BadLineError):
        return line.record()
    try:
        async with AsyncExitStack() as stack:
            call = await service.open(line.body, stack)
            if call.request.stream:
                raise ApiError(400, "a batch has no streams; leave stream out", param="stream")
            return line.record(200, await call.completion())
    except ApiError as error:
        return line.record(error.status, error.body())
    except Exception:  # one request must not end the others
        log.exception("request %r failed", line.custom_id)
        return line.record(500, internal_error().body())


if __name__ == "__main__":
    sys.exit(main())
