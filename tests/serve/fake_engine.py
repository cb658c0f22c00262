"""An engine without a model: the same add / step / abort, a prompt of words, answers from a script.

The last user message chooses the answer: "count" and "flood" never end, "nan" fails alone, "tangle"
too, by its form, "late" runs out of time, "gigabytes" finds no memory for its pictures, anything
else is repeated. One word is one token; a picture is as many tokens as `TOKENS_PER_IMAGE`.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from itertools import count, repeat
from typing import Any

import numpy as np

from mgvq_runtime import (
    FinishReason,
    Prompt,
    Request,
    RequestOutput,
    StructuredOutputsParams,
    TokenLogprob,
)
from mgvq_runtime.errors import ContextLengthError, RequestError

MAX_MODEL_LEN = 512
TOKENS_PER_IMAGE = 5


class FakeChatProcessor:
    def __init__(self) -> None:
        self.words: list[str] = []
        self.image_sizes: list[tuple[int, int]] = []

    def prepare(self, messages: list[dict[str, Any]], images: list[Any]) -> Prompt:
        placed, words = 0, []
        for message in messages:
            content = message["content"]
            parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
            for part in parts:
                if part["type"] == "image":
                    placed += 1
                else:
                    words += [f"{message['role']}:", *part["text"].split()]
        if placed != len(images):
            raise RequestError(f"{placed} places for {len(images)} pictures", param="messages")
        if "gigabytes" in words:
            raise MemoryError
        self.image_sizes = [image.decode().size for image in images]
        start = len(self.words)
        self.words += words
        ids = [*range(start, start + len(words)), *[-1] * (TOKENS_PER_IMAGE * len(images))]
        return Prompt(ids, (), np.zeros((3, len(ids)), np.int64), 0)


class FakeGrammars:
    """Takes every form but those that say "wrong"; waits for `gate` where they say "slow"."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.compiled: set[str] = set()

    def holds(self, params: StructuredOutputsParams) -> bool:
        return repr(params) in self.compiled

    def compile(self, params: StructuredOutputsParams) -> None:
        assert threading.current_thread().name.startswith("mgvq-forms")
        if "slow" in repr(params):
            self.gate.wait(60)
        if "wrong" in repr(params):
            raise RequestError("no such thing", param=f"structured_outputs.{params.kind}")
        self.compiled.add(repr(params))


@dataclass
class _Running:
    request: Request
    script: Any
    made: list[str] = field(default_factory=list)


class FakeEngine:
    def __init__(self, max_num_seqs: int = 8, step_s: float = 0.0) -> None:
        self.chat_processor = FakeChatProcessor()
        self.grammars = FakeGrammars()
        self.max_model_len = MAX_MODEL_LEN
        self.max_num_seqs = max_num_seqs
        self.step_s = step_s
        self.gate = threading.Event()
        self.gate.set()
        self.fails_next_step = False
        self.requests: list[Request] = []
        self.aborted: list[str] = []
        self.most_running = 0
        self.threads: set[str] = set()
        self._open: dict[str, _Running] = {}

    def add(self, request: Request) -> None:
        self.threads.add(threading.current_thread().name)
        num_tokens = len(request.prompt.token_ids)
        if num_tokens + 1 > self.max_model_len:
            raise ContextLengthError(num_tokens, self.max_model_len)
        words = [self.chat_processor.words[i] for i in request.prompt.token_ids if i >= 0]
        last = words[len(words) - words[::-1].index("user:") :] if "user:" in words else words
        if "refuse" in last and request.request_id.endswith("-1"):
            raise RequestError("the second answer is refused", param="n")
        if "trip" in last:
            raise KeyError("0x7f00 /secret/path")
        script = {"count": map(str, count(1)), "flood": repeat("x" * 10_000)}.get(
            last[0] if last else "", iter(last)
        )
        self.requests.append(request)
        self._open[request.request_id] = _Running(request, script)

    def step(self) -> list[RequestOutput]:
        self.threads.add(threading.current_thread().name)
        self.gate.wait()
        time.sleep(self.step_s)
        if self.fails_next_step:
            raise RuntimeError("CUDA error at 0x7f00 in /secret/path")
        running = list(self._open.values())[: self.max_num_seqs]
        self.most_running = max(self.most_running, len(running))
        return [self._advance(one) for one in running]

    def abort(self, request_id: str) -> None:
        self.threads.add(threading.current_thread().name)
        if self._open.pop(request_id, None) is not None:
            self.aborted.append(request_id)

    def has_unfinished(self) -> bool:
        return bool(self._open)

    def _advance(self, one: _Running) -> RequestOutput:
        params = one.request.sampling_params
        word = next(one.script, None)
        reason, error, code, text = None, None, None, ""
        if word == "nan":
            reason, error = FinishReason.ERROR, "not finite"
        elif word == "tangle":
            reason, error, code = FinishReason.ERROR, "too complex to follow", "form_too_complex"
        elif word == "late":
            reason, error = FinishReason.TIMEOUT, "the request did not end within 600 seconds"
        elif word is None or word in params.stop:
            reason = FinishReason.STOP
        else:
            text = f" {word}" if one.made else word
            one.made.append(word)
            if len(one.made) == params.max_tokens:
                reason = FinishReason.LENGTH
        if reason is not None:
            del self._open[one.request.request_id]
        logprobs = None
        if params.logprobs is not None:
            others = tuple(
                TokenLogprob(i, f"other{i}", f"other{i}".encode(), float("-inf"))
                for i in range(params.logprobs)
            )
            logprobs = (TokenLogprob(7, text, text.encode(), -0.5, others),)
        return RequestOutput(
            one.request.request_id,
            text,
            (7,),
            logprobs,
            reason,
            len(one.request.prompt.token_ids),
            len(one.made),
            0,
            error,
            error_code=code,
        )
