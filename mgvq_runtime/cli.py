"""`mgvq-chat`: ask about a picture, once or in a conversation (a front door, run by people).

All flags of the engine come from `config.EngineConfig`. The answer goes to standard output, all
else to standard error, so that one-shot answers can be piped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import mgvq_runtime
from mgvq_runtime.config import (
    EngineConfig,
    add_config_arguments,
    config_from_arguments,
    field_docs,
)
from mgvq_runtime.env import debug_tracebacks
from mgvq_runtime.errors import MgvqError
from mgvq_runtime.interrupts import collect_ctrl_c
from mgvq_runtime.multimodal.image import MediaLimits
from mgvq_runtime.pictures import open_picture
from mgvq_runtime.request import FinishReason, SamplingParams

if TYPE_CHECKING:
    from mgvq_runtime import LLM

HELP = (
    "/image FILE shows the model a picture, /reset starts over, /quit leaves, "
    "Ctrl-C stops an answer"
)
SAMPLING_FLAGS = {"max_tokens": 512, "temperature": 0.0, "top_p": 1.0, "top_k": 0}
"""Sampling fields with a flag, and the default at a terminal: the best answer, not a varied one."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `mgvq-chat`.

    Returns:
        The exit status: 0, 2 for what the user can put right, 130 after Ctrl-C.
    """
    parsed = build_parser().parse_args(arguments)
    shows_traceback = False
    try:
        shows_traceback = debug_tracebacks()
        config = config_from_arguments(parsed)
        params = SamplingParams(**{name: getattr(parsed, name) for name in SAMPLING_FLAGS})
        for image in parsed.image:  # before the model is loaded
            open_picture(image, MediaLimits())
        with _load(config) as llm:
            if parsed.question is not None:
                return _one_shot(llm, params, parsed.image, parsed.question)
            return _conversation(llm, params, parsed.image)
    except MgvqError as error:
        if shows_traceback:
            raise
        print(f"mgvq-chat: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `mgvq-chat`."""
    parser = argparse.ArgumentParser(
        prog="mgvq-chat",
        description="Ask a vision-language model about a picture. Without a question it starts a "
        f"conversation: {HELP}.",
        allow_abbrev=False,
    )
    parser.add_argument("question", nargs="?", metavar="QUESTION", help="ask this and leave")
    parser.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="a picture; may be repeated"
    )
    parser.add_argument(
        "--version", action="version", version=f"%(prog)s {mgvq_runtime.__version__}"
    )
    add_config_arguments(parser)
    group = parser.add_argument_group("sampling")
    docs = field_docs(SamplingParams)
    for name, default in SAMPLING_FLAGS.items():
        group.add_argument(
            "--" + name.replace("_", "-"),
            type=type(default),
            default=default,
            metavar="N" if isinstance(default, int) else "X",
            help=f"{docs[name].rstrip('.')} (default: {default})",
        )
    return parser


def _load(config: EngineConfig) -> LLM:
    """Load the model and say which one answers."""
    settings = {field.name: getattr(config, field.name) for field in fields(config)}
    which = config.checkpoint or "the bundled demonstration model (--checkpoint takes another)"
    print(f"mgvq-chat: loading {which}", file=sys.stderr)
    return mgvq_runtime.LLM(**settings)


def _one_shot(llm: LLM, params: SamplingParams, images: Sequence[str], question: str) -> int:
    _, reason = _answer(llm, params, [_user_message(images, question)])
    return {FinishReason.ABORT: 130, FinishReason.ERROR: 1}.get(reason, 0)


def _conversation(llm: LLM, params: SamplingParams, images: Sequence[str]) -> int:
    """Read questions until /quit or the end of the input."""
    history: list[dict[str, Any]] = []
    pending = list(images)
    print(HELP, file=sys.stderr)
    for line in _lines():
        command, _, argument = line.partition(" ")
        if command == "/quit":
            break
        if command == "/reset":
            history, pending = [], []
        elif command == "/image" and argument:
            _show(pending, argument.strip())
        elif command.startswith("/"):
            print(HELP, file=sys.stderr)
        else:
            _turn(llm, params, history, pending, line)
    return 0


def _show(pending: list[str], image: str) -> None:
    """Keep a picture for the next question, if it can be read."""
    try:
        open_picture(image, MediaLimits())
    except MgvqError as error:
        print(f"error: {error}", file=sys.stderr)
    else:
        pending.append(image)


def _turn(
    llm: LLM,
    params: SamplingParams,
    history: list[dict[str, Any]],
    pending: list[str],
    question: str,
) -> None:
    """Answer one question; the history grows only by what was answered."""
    asked = [*history, _user_message(pending, question)]
    try:
        answer, _ = _answer(llm, params, asked)
    except MgvqError as error:
        print(f"error: {error}", file=sys.stderr)
    else:
        history[:] = [*asked, {"role": "assistant", "content": answer}]
    pending.clear()


def _answer(
    llm: LLM, params: SamplingParams, messages: Sequence[dict[str, Any]]
) -> tuple[str, FinishReason]:
    """Print an answer as it comes; return it and why it ended, ABORT after Ctrl-C."""
    text, reason = "", FinishReason.ABORT
    with collect_ctrl_c() as pressed, closing(llm.stream(messages, params)) as outputs:
        for output in outputs:
            print(output.text, end="", flush=True)
            text += output.text
            reason = output.finish_reason or reason
            if output.error is not None:
                print(f"error: {output.error}", file=sys.stderr)
            if pressed:
                break
        print(flush=True)
    if reason is FinishReason.ABORT:
        print("[stopped]", file=sys.stderr)
    elif reason is FinishReason.LENGTH:
        print("[cut at --max-tokens or the end of the context]", file=sys.stderr)
    return text, reason


def _lines() -> Iterator[str]:
    """Yield the lines typed, without empty ones, to the end of the input or Ctrl-C."""
    if sys.stdin.isatty():
        import readline  # noqa: F401 - gives input() a history and editing
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return
        if line:
            yield line


def _user_message(images: Sequence[str], question: str) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": i}} for i in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": question}]}


if __name__ == "__main__":
    sys.exit(main())
