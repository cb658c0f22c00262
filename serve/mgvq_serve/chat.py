"""One chat request, from its JSON body to its answer (called by `app`, endpoint by endpoint).

`ChatService.open` checks everything that can be checked - fields, pictures, context length, room in
the queue - and gives a `ChatCall` that the engine has accepted; only then may a response start. The
call is read whole (`completion`) or piece by piece (`chunks`). Sockets are for `stream` and `app`.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol

from mgvq_runtime import (
    EncodedImage,
    FinishReason,
    Prompt,
    Request,
    RequestOutput,
    StructuredOutputsParams,
    TokenLogprob,
)
from mgvq_runtime.errors import ContextLengthError, MgvqError, RequestError, TokenizerError
from mgvq_runtime.multimodal.image import Visual
from mgvq_serve.admission import Admission
from mgvq_serve.engine_thread import EngineThread, Mailbox
from mgvq_serve.errors import ApiError, from_runtime_error, internal_error, timed_out
from mgvq_serve.media import ImageLoader
from mgvq_serve.protocol import (
    SYSTEM_FINGERPRINT,
    ChatRequest,
    Json,
    Message,
    TextPart,
    VideoPart,
    choice_body,
    completion_body,
    count_visuals,
    delta_body,
    logprobs_body,
    parse_chat_request,
    sampling_params,
    usage_body,
)
from mgvq_serve.settings import ServerSettings
from mgvq_serve.structured import AskedForm, asked_form

MAX_CHARS_PER_TOKEN = 256  # no vocabulary we know has a longer token; a million tokens take 2-5 s
PARSE_IN_POOL_BYTES = 256 * 1024  # a larger body takes a millisecond or more: off the event loop
COMPILE_THREADS = 2  # of their own: a form may take seconds, and pictures do not wait for it


class PromptBuilder(Protocol):
    """What is needed of the runtime's chat processor."""

    def prepare(self, messages: list[dict[str, Any]], visuals: list[Visual]) -> Prompt:
        """Return token ids, patches and positions of a conversation."""


class GrammarCompiler(Protocol):
    """What is needed of the runtime's grammars."""

    def holds(self, params: StructuredOutputsParams) -> bool:
        """Return whether a form is compiled already."""

    def compile(self, params: StructuredOutputsParams) -> object:
        """Compile a form and keep it for the engine; safe in any thread."""


@dataclass(frozen=True)
class ServedModel:
    """The model as clients see it."""

    name: str
    max_model_len: int
    created: int
    """Unix time of the server's start."""


class ChatService:
    """Turns request bodies into calls that the engine works on."""

    def __init__(
        self,
        model: ServedModel,
        engine: EngineThread,
        chat_processor: PromptBuilder,
        grammars: GrammarCompiler,
        images: ImageLoader,
        admission: Admission,
        settings: ServerSettings,
    ) -> None:
        """Wire the parts together; `close` ends the thread pools."""
        self.model = model
        self.engine = engine
        self.admission = admission
        self._chat_processor = chat_processor
        self._grammars = grammars
        self._images = images
        self._settings = settings
        self._pool = ThreadPoolExecutor(settings.media_threads, thread_name_prefix="mgvq-media")
        self._compile_pool = ThreadPoolExecutor(COMPILE_THREADS, thread_name_prefix="mgvq-forms")

    def close(self) -> None:
        """End the pools; what is being decoded or compiled is finished, the rest dropped."""
        for pool in (self._pool, self._compile_pool):
            pool.shutdown(wait=False, cancel_futures=True)

    async def open(self, body: bytes, stack: AsyncExitStack) -> ChatCall:
        """Check a request and give it to the engine.

        Args:
            body: The JSON body.
            stack: Gets what must happen when the call ends: leaving the queue, and aborting in the
                engine whatever has not finished.

        Raises:
            ApiError: if anything is wrong with the request, or there is no room for it.
        """
        loop = asyncio.get_running_loop()
        if len(body) > PARSE_IN_POOL_BYTES:
            request = await loop.run_in_executor(self._pool, parse_chat_request, body)
        else:
            request = parse_chat_request(body)
        if request.model != self.model.name:
            raise model_not_found(request.model, self.model.name)
        num_images, num_frames = count_visuals(request.messages)
        if num_images > self._settings.limit_images:
            message = (
                f"at most {self._settings.limit_images} images in one request, got {num_images}"
            )
            raise ApiError(400, message, param="messages", code="too_many_images")
        if num_frames > self._settings.limit_frames:
            message = (
                f"at most {self._settings.limit_frames} frames in one request, got {num_frames}"
            )
            raise ApiError(400, message, param="messages", code="too_many_frames")
        self._check_text_length(request.messages)
        form = asked_form(request)
        stack.enter_context(self.admission.admit(request.num_choices))
        call_id = f"chatcmpl-{uuid.uuid4().hex}"
        try:
            if form is not None and not self._grammars.holds(form.params):
                await loop.run_in_executor(self._compile_pool, self._compile, form)
            requests = await loop.run_in_executor(
                self._pool, self._requests, call_id, request, form
            )
            mailbox = await self.engine.submit(requests)
        except MgvqError as error:
            raise from_runtime_error(error, "messages") from error
        stack.callback(self.engine.release, mailbox)
        request.messages.clear()  # pictures in base64: nobody needs them any more
        form_param = None if form is None else form.param
        return ChatCall(call_id, self.model.name, request, mailbox, form_param)

    def _check_text_length(self, messages: list[Message]) -> None:
        """Refuse text that cannot fit before spending seconds and gigabytes on its tokens."""
        num_chars = 0
        for message in messages:
            if isinstance(message.content, str):
                num_chars += len(message.content)
            else:
                num_chars += sum(len(p.text) for p in message.content if isinstance(p, TextPart))
        fewest_tokens = num_chars // MAX_CHARS_PER_TOKEN
        if fewest_tokens > self.model.max_model_len:
            error = ContextLengthError(fewest_tokens, self.model.max_model_len)
            raise from_runtime_error(error)

    def _compile(self, form: AskedForm) -> None:
        """Check a form before its pictures, and not in the engine's thread, which has others."""
        try:
            self._grammars.compile(form.params)
        except RequestError as error:
            raise ApiError(400, str(error), param=form.param, code=error.code) from error

    def _prepare(self, messages: list[Message]) -> Prompt:
        """Read pictures and build the prompt."""
        plain: list[dict[str, Any]] = []
        visuals: list[Visual] = []
        images: list[EncodedImage] = []
        for index, message in enumerate(messages):
            role = "system" if message.role == "developer" else message.role
            if isinstance(message.content, str):
                plain.append({"role": role, "content": message.content})
                continue
            parts: list[dict[str, str]] = []
            for place, part in enumerate(message.content):
                where = f"messages[{index}].content[{place}]"
                if isinstance(part, TextPart):
                    parts.append({"type": "text", "text": part.text})
                elif isinstance(part, VideoPart):
                    frames = [
                        self._load(url, None, f"{where}.video[{number}]", images)
                        for number, url in enumerate(part.video)
                    ]
                    visuals.append(frames)
                    parts.append({"type": "video"})
                else:
                    url, detail = part.image_url.url, part.image_url.detail
                    visuals.append(self._load(url, detail, f"{where}.image_url.url", images))
                    parts.append({"type": "image"})
            plain.append({"role": role, "content": parts})
        try:
            return self._chat_processor.prepare(plain, visuals)
        except TokenizerError as error:  # the checkpoint's chat template refuses these messages
            raise ApiError(400, str(error), param="messages") from error

    def _load(
        self, url: str, detail: str | None, param: str, images: list[EncodedImage]
    ) -> EncodedImage:
        """Read one picture, and add it to all pictures of the request, which have limits."""
        try:
            images.append(self._images.load(url, detail, param))
        except MgvqError as error:
            raise from_runtime_error(error, param) from error
        self._images.check_total(images, param)
        return images[-1]

    def _requests(
        self, call_id: str, request: ChatRequest, form: AskedForm | None
    ) -> list[Request]:
        """Return what the engine is asked, one request a choice (in a thread of the pool)."""
        try:
            prompt = self._prepare(request.messages)
        except MemoryError:
            raise ApiError(
                400,
                "the messages with their images take more memory to prepare than this server has; "
                "send fewer or smaller images",
                param="messages",
                code="images_too_large",
            ) from None
        room = self.model.max_model_len - len(prompt.token_ids)
        if room < 1:
            raise ContextLengthError(len(prompt.token_ids), self.model.max_model_len)
        return [
            Request(
                f"{call_id}-{choice}",
                prompt,
                params,
                request.cache_salt,
                request.priority or 0,
                self._settings.request_timeout or None,
            )
            for choice, params in enumerate(sampling_params(request, form, room))
        ]


def model_not_found(name: str, served: str) -> ApiError:
    """Return the 404 for a model that is not served here."""
    return ApiError(
        404,
        f"The model {name[:100]!r} does not exist here; this server has {served!r}.",
        error_type="not_found_error",
        code="model_not_found",
        param="model",
    )


@dataclass
class _Choice:
    """One answer while it grows."""

    index: int
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    last: RequestOutput | None = None

    def extend(self, output: RequestOutput, form_param: str | None) -> None:
        """Append what one step added.

        Raises:
            ApiError: if the answer failed: 400 where its form, in the field `form_param`, did it.
        """
        if output.error_code is not None:
            raise ApiError(400, output.error or "", param=form_param, code=output.error_code)
        if output.finish_reason is FinishReason.TIMEOUT:
            raise timed_out(output.error or "")
        if output.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
            raise internal_error("The engine could not finish this answer.")
        self.text += output.text
        self.logprobs.extend(output.logprobs or ())
        self.last = output
        if output.finish_reason is not None:
            self.finish_reason = output.finish_reason.value

    def take_logprobs(self, is_wanted: bool | None) -> Json | None:
        """Return the logprobs gathered since the last call, where they were asked for."""
        gathered, self.logprobs = self.logprobs, []
        return logprobs_body(gathered) if is_wanted else None


class ChatCall:
    """A request the engine has accepted, and the answer as it comes."""

    def __init__(
        self,
        call_id: str,
        model: str,
        request: ChatRequest,
        mailbox: Mailbox,
        form_param: str | None,
    ) -> None:
        """Take over a mailbox; the head is the same in every chunk.

        Args:
            call_id: The answer's id on the wire.
            model: The model's name on the wire.
            request: What was asked.
            mailbox: Where the outputs arrive.
            form_param: The field that asked for a form, for errors.
        """
        self.request = request
        self._form_param = form_param
        self._head = {
            "id": call_id,
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": SYSTEM_FINGERPRINT,
        }
        self._mailbox = mailbox
        self._choices = {r.request_id: _Choice(i) for i, r in enumerate(mailbox.requests)}

    async def completion(self) -> Json:
        """Wait for the whole answer and return the response body.

        Raises:
            ApiError: if the engine fails, or cannot follow the form of the answer.
        """
        while not self._is_finished():
            await self._advance(None)
        wanted = self.request.logprobs
        choices = [
            choice_body(c.index, c.text, c.finish_reason or "stop", c.take_logprobs(wanted))
            for c in self._choices.values()
        ]
        return completion_body(self._head, choices, self._usage())

    async def chunks(self, ping_interval_s: float) -> AsyncGenerator[Json | None]:
        """Yield the bodies of stream chunks as the answer comes, in OpenAI's order.

        Args:
            ping_interval_s: Yield None after so many seconds of silence; 0 is never.

        Raises:
            ApiError: as `completion`; chunks may have been yielded by then.
        """
        for choice in self._choices.values():
            yield self._chunk(delta_body(choice.index, {"role": "assistant", "content": ""}))
        wanted = self.request.logprobs
        while not self._is_finished():
            touched = await self._advance(ping_interval_s or None)
            if not touched:
                yield None
            for choice in touched:
                if choice.text:
                    delta = {"content": choice.text}
                    logprobs = choice.take_logprobs(wanted)
                    choice.text = ""
                    yield self._chunk(delta_body(choice.index, delta, None, logprobs))
                if choice.finish_reason:
                    rest = choice.take_logprobs(wanted) if choice.logprobs else None
                    yield self._chunk(delta_body(choice.index, {}, choice.finish_reason, rest))
        if self.request.wants_usage:
            yield self._head | {"choices": [], "usage": self._usage()}

    def _is_finished(self) -> bool:
        return all(choice.finish_reason for choice in self._choices.values())

    async def _advance(self, timeout_s: float | None) -> list[_Choice]:
        """Wait for outputs; return the choices that grew, each once, in order of index."""
        try:
            outputs = await self._mailbox.take(timeout_s)
        except MgvqError as error:
            raise from_runtime_error(error) from error
        touched = set()
        for output in outputs:
            choice = self._choices[output.request_id]
            choice.extend(output, self._form_param)
            touched.add(choice.index)
        return [choice for choice in self._choices.values() if choice.index in touched]

    def _chunk(self, choice: Json) -> Json:
        body = self._head | {"choices": [choice]}
        return body | {"usage": None} if self.request.wants_usage else body

    def _usage(self) -> Json:
        last = [choice.last for choice in self._choices.values() if choice.last is not None]
        return usage_body(last)
