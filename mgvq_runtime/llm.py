"""The offline front door: questions about pictures in, answers out (called by users and `cli`).

`LLM.chat` answers one conversation or many at once, `LLM.stream` yields the text as it comes. The
network is never used: a picture is a data URL, a file or a PIL image. HTTP is `mgvq_serve`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Self, overload

from tqdm import tqdm

from mgvq_runtime.config import EngineConfig
from mgvq_runtime.engine.engine import Engine
from mgvq_runtime.engine.memory import MemorySummary
from mgvq_runtime.errors import MgvqError, RequestError
from mgvq_runtime.interrupts import hold_ctrl_c
from mgvq_runtime.multimodal.image import MediaLimits
from mgvq_runtime.pictures import Message, take_pictures
from mgvq_runtime.request import (
    FinishReason,
    Prompt,
    Request,
    RequestOutput,
    SamplingParams,
    TokenLogprob,
)


@dataclass(frozen=True)
class Usage:
    """Tokens a request took."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = field(default=0, compare=False)
    """Prompt tokens whose keys and values were in the cache; the answer does not depend on it."""


@dataclass(frozen=True)
class ChatReply:
    """One whole answer."""

    text: str
    token_ids: tuple[int, ...]
    """Tokens generated, an end token included."""
    finish_reason: FinishReason
    usage: Usage
    logprobs: tuple[TokenLogprob, ...] | None = None
    """One entry a token, where the sampling parameters asked for them."""
    error: str | None = None
    """What went wrong, where finish_reason is ERROR."""


class LLM:
    """A loaded model that answers questions about pictures.

    Use it as a context manager, or call `close`, to give the memory back.
    """

    def __init__(self, checkpoint: str | Path | None = None, **settings: Any) -> None:
        """Load a checkpoint.

        Args:
            checkpoint: Checkpoint folder, quantized or dense; None takes the bundled demonstration
                model.
            **settings: Fields of `EngineConfig`, such as `device="cpu"` or `max_model_len=2048`.

        Raises:
            ConfigError: if a setting is unknown, the nearest known one is named, or out of range.
            CheckpointError: if the folder is missing, damaged or not ours.
        """
        folder = None if checkpoint is None else str(checkpoint)
        config = EngineConfig.from_dict({"checkpoint": folder, **settings})
        self._engine: Engine | None = Engine.from_checkpoint(config=config)
        self._limits = MediaLimits()
        self._mail: dict[str, list[RequestOutput]] = {}
        self._ids = count()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def engine(self) -> Engine:
        """The engine underneath.

        Raises:
            RuntimeError: if this LLM was closed.
        """
        if self._engine is None:
            raise RuntimeError("this LLM was closed; make a new one")
        return self._engine

    def close(self) -> None:
        """Let go of weights and cache; a second call does nothing."""
        self._engine = None

    def memory_summary(self) -> MemorySummary:
        """Return how much memory weights and cache take, and the most the process has held."""
        return self.engine.memory_summary()

    @overload
    def chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        use_tqdm: bool = True,
    ) -> ChatReply: ...

    @overload
    def chat(
        self,
        messages: Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams | None] | None = None,
        use_tqdm: bool = True,
    ) -> list[ChatReply]: ...

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams | None] | None = None,
        use_tqdm: bool = True,
    ) -> ChatReply | list[ChatReply]:
        """Answer one conversation, or a list of them together.

        Args:
            messages: A conversation, or a list of conversations. An image part is
                `{"type": "image_url", "image_url": {"url": data URL, file:// URL or path}}` or
                `{"type": "image", "image": PIL image or path}`, a video `{"type": "video", "video":
                [PIL images or paths, one a frame]}`. `"detail": "low"` beside a url makes
                its picture small, as over HTTP.
            sampling_params: How tokens are chosen: one for all, or one a conversation; None takes
                the defaults.
            use_tqdm: Whether a list shows a progress bar; it does so on a terminal only.

        Returns:
            One reply, or a list of them in the order of the conversations. In a list, a
            conversation that cannot be served has finish_reason ERROR and says why in `error`.

        Raises:
            RequestError: if a single conversation cannot be served, or messages or sampling
                parameters are not of that form.
            ImageError: if a picture of a single conversation cannot be read.
            KeyboardInterrupt: after Ctrl-C, when the step it fell into is done; nothing goes on
                running, and the next call is served.
        """
        _check_is_list(messages)
        is_single = bool(messages) and isinstance(messages[0], Mapping)
        asked: Sequence[Any] = [messages] if is_single else messages
        return self._answer(asked, self._prepare, sampling_params, use_tqdm, is_single)

    @overload
    def generate(
        self,
        prompts: str,
        sampling_params: SamplingParams | None = None,
        use_tqdm: bool = True,
    ) -> ChatReply: ...

    @overload
    def generate(
        self,
        prompts: list[str],
        sampling_params: SamplingParams | Sequence[SamplingParams | None] | None = None,
        use_tqdm: bool = True,
    ) -> list[ChatReply]: ...

    def generate(
        self,
        prompts: str | list[str],
        sampling_params: SamplingParams | Sequence[SamplingParams | None] | None = None,
        use_tqdm: bool = True,
    ) -> ChatReply | list[ChatReply]:
        """Continue plain text, without a chat template and without pictures.

        Args:
            prompts: A text, or a list of texts.
            sampling_params: How tokens are chosen: one for all, or one a text; None takes the
                defaults.
            use_tqdm: Whether a list shows a progress bar; it does so on a terminal only.

        Returns:
            One reply, or a list of them, as `chat`.

        Raises:
            RequestError: if a single text cannot be served, or sampling parameters are of another
                form.
            KeyboardInterrupt: as `chat`.
        """
        is_single = isinstance(prompts, str)
        asked: Sequence[Any] = [prompts] if is_single else prompts
        return self._answer(asked, self._tokenize, sampling_params, use_tqdm, is_single)

    def stream(
        self, messages: Sequence[Message], sampling_params: SamplingParams | None = None
    ) -> Generator[RequestOutput]:
        """Answer one conversation piece by piece; closing the iterator aborts the answer.

        Raises:
            RequestError: if the conversation cannot be served.
            ImageError: if a picture of it cannot be read.
            KeyboardInterrupt: as `chat`.
        """
        (params,) = _one_each(sampling_params, 1)
        prompt = self._prepare(messages)
        request_id = self._new_id()
        try:
            self._add(request_id, prompt, params)
            reason = None
            while reason is None:
                self._step()
                outputs, self._mail[request_id] = self._mail[request_id], []
                for output in outputs:
                    reason = output.finish_reason
                    yield output
        finally:
            self._forget(request_id)

    def _answer(
        self,
        asked: Sequence[Any],
        prepare: Callable[[Any], Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams | None] | None,
        use_tqdm: bool,
        is_single: bool,
    ) -> Any:
        """Run all that was asked to its end; each is prepared only when its turn is near."""
        params = _one_each(sampling_params, len(asked))
        queue = iter(enumerate(zip(asked, params, strict=True)))
        replies: dict[int, ChatReply] = {}
        running: dict[str, int] = {}
        is_hidden = True if is_single or not use_tqdm else None  # None: unless on a terminal
        progress = tqdm(total=len(asked), unit="answer", disable=is_hidden)
        try:
            while len(replies) < len(asked):
                while len(running) < 2 * self.engine.config.max_num_seqs:
                    turn = next(queue, None)
                    if turn is None:
                        break
                    index, (one, how) = turn
                    request_id = self._new_id()
                    running[request_id] = index  # before _add, so that a Ctrl-C in it forgets both
                    try:
                        self._add(request_id, prepare(one), how)
                    except MgvqError as error:
                        if is_single:
                            raise
                        del running[request_id]
                        replies[index] = _failed(str(error))
                self._step()
                for request_id in list(running):
                    outputs = self._mail[request_id]
                    if outputs and outputs[-1].finish_reason is not None:
                        replies[running.pop(request_id)] = _joined(outputs)
                        self._forget(request_id)
                progress.update(len(replies) - progress.n)
        finally:
            try:
                self._forget(*running)
            finally:
                progress.close()
        return replies[0] if is_single else [replies[index] for index in range(len(asked))]

    def _prepare(self, messages: Sequence[Message]) -> Prompt:
        _check_is_list(messages)
        cleaned, visuals = take_pictures(messages, self._limits)
        return self.engine.chat_processor.prepare(cleaned, visuals)

    def _tokenize(self, text: str) -> Prompt:
        tokenizer = self.engine.tokenizer
        return Prompt.from_token_ids([*tokenizer.opening_ids, *tokenizer.encode(text)])

    def _new_id(self) -> str:
        return f"llm-{next(self._ids)}"

    # A Ctrl-C waits until these three are done: what engine and mail hold must stay the same.

    def _add(self, request_id: str, prompt: Prompt, params: SamplingParams) -> None:
        with hold_ctrl_c():
            self.engine.add(Request(request_id, prompt, params))
            self._mail[request_id] = []

    def _step(self) -> None:
        """Run one step; what each request gains waits in its mail, whoever asked for the step."""
        with hold_ctrl_c():
            for output in self.engine.step():
                self._mail[output.request_id].append(output)

    def _forget(self, *request_ids: str) -> None:
        """Abort requests if they go on, and throw their mail away; some may not have been added."""
        with hold_ctrl_c():
            for request_id in request_ids:
                self._mail.pop(request_id, None)
                if self._engine is not None:
                    self._engine.abort(request_id)


def _check_is_list(messages: Any) -> None:
    """Refuse what would be read letter by letter, or key by key."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise RequestError(
            'a conversation must be a list of {"role": ..., "content": ...}, got '
            f"{type(messages).__name__}; LLM.generate continues plain text",
            param="messages",
        )


def _one_each(params: Any, num_requests: int) -> list[SamplingParams]:
    """Return the parameters of each request; None stands for the defaults."""
    if params is None or isinstance(params, SamplingParams):
        params = [params] * num_requests
    if not isinstance(params, Sequence):
        params = [params]  # the loop below names its type
    elif len(params) != num_requests:
        raise RequestError(
            f"got {len(params)} sampling parameters for {num_requests} requests",
            param="sampling_params",
        )
    for one in params:
        if one is not None and not isinstance(one, SamplingParams):
            raise RequestError(
                f"sampling_params must be SamplingParams, or a list of them, got "
                f"{type(one).__name__}",
                param="sampling_params",
            )
    return [one or SamplingParams() for one in params]


def _joined(outputs: Sequence[RequestOutput]) -> ChatReply:
    """Join the pieces of one answer; the last one says why it ended."""
    last = outputs[-1]
    assert last.finish_reason is not None, "only a whole answer is joined"
    logprobs = None
    if last.logprobs is not None:
        logprobs = tuple(entry for output in outputs for entry in output.logprobs or ())
    return ChatReply(
        text="".join(output.text for output in outputs),
        token_ids=tuple(token_id for output in outputs for token_id in output.token_ids),
        finish_reason=last.finish_reason,
        usage=Usage(last.num_prompt_tokens, last.num_completion_tokens, last.num_cached_tokens),
        logprobs=logprobs,
        error=last.error,
    )


def _failed(error: str) -> ChatReply:
    return ChatReply("", (), FinishReason.ERROR, Usage(0, 0), error=error)
