"""What the engine itself is worth: batching, the prefix cache, and the time it adds to a step.

    python -m benchmarks.bench_engine --output benchmarks/results/engine.json

Three measurements in one run of one process, in turns, so that a noisy machine hits all alike:
answers a second of several requests together against one alone, time to the first token of a second
turn against the first on the same picture, and what a step takes beyond the model's own arithmetic.
No two runs share a beginning, except where that is measured. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import base64
import io
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.harness import environment, report
from mgvq_runtime import (
    Engine,
    EngineConfig,
    MediaLimits,
    Prompt,
    Request,
    SamplingParams,
    demo_picture_paths,
)
from mgvq_runtime.errors import MgvqError
from mgvq_runtime.pictures import Message, take_pictures

QUESTIONS = ("What is in the picture?", "How many are there, and of which colour?")
CHAT_PICTURE_SIDE = 1024
"""Pixels of a picture in a chat; it is scaled down to what the model takes."""
TARGETS = {"throughput_ratio": 3.0, "second_turn_share": 0.25, "overhead_ms": 1.5}
"""At least the first, at most the others."""


class ModelClock:
    """Counts the seconds spent in a model's own functions."""

    NAMES = ("embed", "encode_images", "forward", "logits")

    def __init__(self, model: Any) -> None:
        """Put a watch around each of them."""
        self.seconds = 0.0
        for name in self.NAMES:
            setattr(model, name, self._watched(getattr(model, name)))

    def _watched(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*arguments)
            finally:
                self.seconds += time.perf_counter() - began

        return run


@dataclass(frozen=True)
class Throughput:
    """Of some requests together, in tokens a second."""

    whole: float
    """From the first step to the last."""
    decode: float
    """Once every request has its first token."""
    overhead_ms: list[float]
    """Of each step, beyond the model's functions."""


class Bench:
    """One engine and what was measured on it."""

    def __init__(self, engine: Engine, num_requests: int, num_new_tokens: int) -> None:
        """Prepare measurements with so many requests together, of so many tokens each."""
        self.engine = engine
        self.num_requests = num_requests
        self.num_new_tokens = num_new_tokens
        self.pictures = [Image.open(path).convert("RGB") for path in demo_picture_paths()]
        self.clock = ModelClock(engine._runner.model)
        self._numbers = count()

    def throughput(self, num_requests: int) -> Throughput:
        """Answer requests together, each about a picture of its own."""
        for _ in range(num_requests):
            self._add(self._prompt([self._question(self._picture_url(), QUESTIONS[0])]))
        overhead_ms: list[float] = []
        num_tokens, num_begun, decode_began = 0, 0, 0.0
        began = time.perf_counter()
        while self.engine.has_unfinished():
            start, self.clock.seconds = time.perf_counter(), 0.0
            outputs = self.engine.step()
            now = time.perf_counter()
            overhead_ms.append(1000 * (now - start - self.clock.seconds))
            num_tokens += len(outputs)
            if not decode_began and len(outputs) == num_requests:
                num_begun, decode_began = num_tokens, now
        end = time.perf_counter()
        decode = (num_tokens - num_begun) / (end - decode_began)
        return Throughput(num_tokens / (end - began), decode, overhead_ms)

    def two_turns(self) -> tuple[float, float, int, int]:
        """Chat about a new picture; returns seconds to each turn's first token, prompt, cached.

        The picture is as large as people's are, and answers end where the model ends them.
        """
        conversation = [self._question(self._picture_url(CHAT_PICTURE_SIDE), QUESTIONS[0])]
        first_s, answer, _ = self._turn(conversation)
        conversation.append({"role": "assistant", "content": answer})
        conversation.append({"role": "user", "content": QUESTIONS[1]})
        second_s, _, (num_prompt, num_cached) = self._turn(conversation)
        return first_s, second_s, num_prompt, num_cached

    def _turn(self, conversation: Sequence[Message]) -> tuple[float, str, tuple[int, int]]:
        began = time.perf_counter()
        self._add(self._prompt(conversation), is_chat=True)
        outputs = self.engine.step()
        while not outputs:
            outputs = self.engine.step()
        first_s = time.perf_counter() - began
        while self.engine.has_unfinished():
            outputs += self.engine.step()
        text = "".join(output.text for output in outputs)
        return first_s, text, (outputs[0].num_prompt_tokens, outputs[0].num_cached_tokens)

    def _add(self, prompt: Prompt, is_chat: bool = False) -> None:
        number = str(next(self._numbers))
        params = SamplingParams(
            temperature=0.0, max_tokens=self.num_new_tokens, ignore_eos=not is_chat
        )
        salt = None if is_chat else number
        self.engine.add(Request(number, prompt, params, cache_salt=salt))

    def _prompt(self, conversation: Sequence[Message]) -> Prompt:
        return self.engine.chat_processor.prepare(*take_pictures(conversation, MediaLimits()))

    def _question(self, url: str, text: str) -> Message:
        picture = {"type": "image_url", "image_url": {"url": url}}
        return {"role": "user", "content": [picture, {"type": "text", "text": text}]}

    def _picture_url(self, side: int | None = None) -> str:
        """Return a picture nobody has seen: a corner of it counts up."""
        number = next(self._numbers)
        picture = self.pictures[number % len(self.pictures)].copy()
        picture.paste(tuple(number.to_bytes(3, "big")), (0, 0, 28, 28))
        if side is not None:
            picture = picture.resize((side, side), Image.Resampling.BICUBIC)
        file = io.BytesIO()
        picture.save(file, "PNG")
        return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def measure(bench: Bench, repeats: int) -> dict[str, Any]:
    """Take all three measurements in turns; the first round only warms up."""
    alone: list[Throughput] = []
    together: list[Throughput] = []
    first: list[float] = []
    second: list[float] = []
    for turn in range(repeats + 1):
        one, many = bench.throughput(1), bench.throughput(bench.num_requests)
        first_s, second_s, num_prompt, num_cached = bench.two_turns()
        if turn:
            alone.append(one)
            together.append(many)
            first.append(first_s)
            second.append(second_s)
    ratios = [many.whole / one.whole for many, one in zip(together, alone, strict=True)]
    decode_ratios = [many.decode / one.decode for many, one in zip(together, alone, strict=True)]
    shares = [later / sooner for later, sooner in zip(second, first, strict=True)]
    overhead_ms = [ms for many in together for ms in many.overhead_ms]
    return {
        "tokens_per_s_alone": round(statistics.median(one.whole for one in alone), 1),
        "tokens_per_s_together": round(statistics.median(many.whole for many in together), 1),
        "throughput_ratio": round(statistics.median(ratios), 3),
        "throughput_ratio_min": round(min(ratios), 3),
        "decode_ratio": round(statistics.median(decode_ratios), 3),
        "first_turn_ms": round(1000 * statistics.median(first), 2),
        "second_turn_ms": round(1000 * statistics.median(second), 2),
        "second_turn_share": round(statistics.median(shares), 3),
        "second_turn_share_max": round(max(shares), 3),
        "second_turn_prompt_tokens": num_prompt,
        "second_turn_cached_tokens": num_cached,
        "overhead_alone_ms": round(
            statistics.median(ms for one in alone for ms in one.overhead_ms), 3
        ),
        "overhead_ms": round(statistics.median(overhead_ms), 3),
        "overhead_p95_ms": round(statistics.quantiles(overhead_ms, n=20)[-1], 3),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit status."""
    parsed = build_parser().parse_args(arguments)
    machine = environment()
    try:
        config = EngineConfig(
            checkpoint=parsed.checkpoint,
            device=parsed.device,
            num_threads=parsed.num_threads,
            max_num_seqs=parsed.requests,
        )
        engine = Engine.from_checkpoint(config=config)
    except MgvqError as error:
        print(f"bench_engine: error: {error}", file=sys.stderr)
        return 2
    result = measure(Bench(engine, parsed.requests, parsed.new_tokens), parsed.repeats)
    for name, value in result.items():
        print(f"{name:28}{value:>12,}" + (f"   target {TARGETS[name]}" if name in TARGETS else ""))
    document = {
        "benchmark": "engine",
        "environment": machine | {"device": engine.config.device},
        "checkpoint": parsed.checkpoint or "demo",
        "requests": parsed.requests,
        "new_tokens": parsed.new_tokens,
        "repeats": parsed.repeats,
        "targets": TARGETS,
        **result,
    }
    report(document, parsed.output)
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", metavar="DIR", help="the bundled one when not given")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--num-threads", type=int)
    parser.add_argument("--requests", type=int, default=8, help="how many run together")
    parser.add_argument("--new-tokens", type=int, default=128, help="tokens of each answer")
    parser.add_argument("--repeats", type=int, default=9, help="rounds, at least 2")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the JSON here")
    return parser


if __name__ == "__main__":
    sys.exit(main())
