"""Prompts and loops that the engine's tests share."""

from __future__ import annotations

import numpy as np
from PIL import Image

from mgvq_runtime.engine.engine import Engine
from mgvq_runtime.request import Prompt, Request, RequestOutput, SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


def picture(seed: int, width: int = 84, height: int = 56) -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 14, width // 14, 3), dtype=np.uint8)
    return Image.fromarray(coarse.repeat(14, axis=0).repeat(14, axis=1))


def prompt(engine: Engine, text: str, *pictures: Image.Image) -> Prompt:
    parts = [*({"type": "image"} for _ in pictures), {"type": "text", "text": text}]
    return engine.chat_processor.prepare([{"role": "user", "content": parts}], list(pictures))


def prompts(engine: Engine) -> list[Prompt]:
    """Eight prompts of unequal lengths, with no picture, one and two."""
    return [
        prompt(engine, "What is in the picture?", picture(0)),
        prompt(engine, "Describe it."),
        prompt(engine, "How many red circles are there?", picture(1, 140, 112)),
        prompt(engine, "The quick brown fox jumps over the lazy dog " * 3),
        prompt(engine, "Which one is larger?", picture(2), picture(3, 56, 140)),
        prompt(engine, "Où est la bibliothèque?"),
        prompt(engine, "?", picture(4, 196, 28)),
        prompt(engine, "0123456789"),
    ]


def run(
    engine: Engine, asked: list[Prompt], params: SamplingParams | list[SamplingParams] = GREEDY
) -> dict[str, list[RequestOutput]]:
    """Run prompts together to their end; outputs by request id "0", "1", ..."""
    each = params if isinstance(params, list) else [params] * len(asked)
    for index, (one, how) in enumerate(zip(asked, each, strict=True)):
        engine.add(Request(str(index), one, how))
    return finish(engine)


def finish(engine: Engine) -> dict[str, list[RequestOutput]]:
    outputs: dict[str, list[RequestOutput]] = {}
    for _ in range(10_000):
        if not engine.has_unfinished():
            break
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
    assert not engine.has_unfinished()
    assert engine.kv_usage == 0.0
    return outputs


def tokens(outputs: list[RequestOutput]) -> list[int]:
    return [token_id for output in outputs for token_id in output.token_ids]
