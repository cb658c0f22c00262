"""The OpenAI chat wire format: what a request may say, what an answer looks like (used by `chat`).

Types are strict (a number in quotes is refused), unknown top-level fields are ignored, and a field
whose meaning is known but not served is refused by name: the table `NEUTRAL_VALUES` says which
values of such a field change nothing. Answers are plain dictionaries in the order of OpenAI's own.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError

from mgvq_runtime import RequestOutput, SamplingParams, TokenLogprob, __version__
from mgvq_serve.errors import ApiError, shorten, unsupported
from mgvq_serve.structured import AskedForm, StructuredFields

log = logging.getLogger("mgvq_serve")

MAX_CHOICES = 8
MAX_MESSAGES = 4096
MAX_BIASES = 4096
MAX_STOP_TOKEN_IDS = 1024
MIN_LOGPROB = -9999.0  # JSON has no minus infinity; OpenAI writes this number
SYSTEM_FINGERPRINT = f"b1-mgvq-{__version__}"
Usage = dict[str, Any]
Json = dict[str, Any]


class _Wire(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())


class ImageUrl(_Wire):
    """Where a picture is and how closely to look at it."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class TextPart(_Wire):
    """A piece of text in a message."""

    type: Literal["text"]
    text: str


class ImagePart(_Wire):
    """A picture in a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


class VideoPart(_Wire):
    """A video in a message, as a list of frames: files of videos are not decoded here."""

    type: Literal["video"]
    video: Annotated[list[str], Field(min_length=1)]


Part = Annotated[TextPart | ImagePart | VideoPart, Field(discriminator="type")]
Content = Annotated[
    Annotated[str, Tag("string")] | Annotated[list[Part], Field(min_length=1), Tag("parts")],
    Discriminator(lambda value: "string" if isinstance(value, str) else "parts"),
]


class Message(_Wire):
    """One turn of the conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    tool_calls: list[Any] | None = None
    function_call: Any = None
    audio: Any = None


class StreamOptions(_Wire):
    """What a stream says besides the answer."""

    include_usage: bool = False


class ChatRequest(StructuredFields):
    """Body of POST /v1/chat/completions."""

    model_config = ConfigDict(extra="allow")

    model: str
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)] | None = None
    logit_bias: (
        Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MAX_BIASES)]
        | None
    ) = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: (
        Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(max_length=MAX_STOP_TOKEN_IDS)]
        | None
    ) = None
    include_stop_str_in_output: bool | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    ignore_eos: bool | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    cache_salt: str | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None

    @property
    def num_choices(self) -> int:
        """How many answers are asked for."""
        return self.n or 1

    @property
    def wants_usage(self) -> bool:
        """Whether the stream ends with a chunk of token counts."""
        return self.stream_options is not None and self.stream_options.include_usage


# Fields with a known meaning that this release does not serve; the values here ask for nothing.
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "allowed_token_ids": ([],),
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "guided_decoding_backend": ("auto", "guidance"),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"],),
    "prediction": (),
    "prompt_logprobs": (0,),
    "reasoning_effort": ("none",),
    "return_token_ids": (False,),
    "skip_special_tokens": (True,),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "web_search_options": (),
}
# Labels for the client's own records: they never change an answer.
LABELS = {
    "metadata", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_retention",
    "request_id", "safety_identifier", "service_tier", "user",
}  # fmt: skip


def parse_chat_request(body: bytes) -> ChatRequest:
    """Read and check a request body.

    Raises:
        ApiError: 400 naming the first field at fault.
    """
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        raise _invalid(error) from None
    _check_supported(request)
    return request


def _invalid(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    param = _field_path(first["loc"])
    message = shorten(f"{param or 'body'}: {first['msg']}", 500)
    return ApiError(400, f"{message} ({first['type']})", param=param)


def _field_path(location: tuple[int | str, ...]) -> str | None:
    """Return `messages[0].content[1].text` without the tags that pydantic puts between."""
    path, skip_next = "", False
    for step in location:
        if isinstance(step, int):
            path += f"[{step}]"
            skip_next = ".content[" in path  # the tag of the content part follows its index
        elif skip_next or (step in ("parts", "string") and path.endswith(".content")):
            skip_next = False
        elif step not in ("str", "list[str]", "dict[str,any]"):
            path += f".{step}" if path else step
    return path or None


def _check_supported(request: ChatRequest) -> None:
    """Refuse what is understood and not served, and combinations that contradict themselves."""
    extra = request.model_extra or {}
    for name, value in extra.items():
        if name in NEUTRAL_VALUES and value is not None and value not in NEUTRAL_VALUES[name]:
            raise unsupported(name, f"{name} is" if name != "tools" else "tools are")
    ignored = sorted(extra.keys() - NEUTRAL_VALUES.keys() - LABELS)
    if ignored:
        names = ", ".join(repr(shorten(name, 40)) for name in ignored[:8])
        log.info("ignoring %d unknown request fields: %s", len(ignored), names)
    for index, message in enumerate(request.messages):
        where = f"messages[{index}]"
        if message.tool_calls or message.function_call or message.audio:
            raise unsupported(where, "tool calls and audio in messages are")
        is_list = isinstance(message.content, list)
        if is_list and message.role != "user" and any(count_visuals([message])):
            raise ApiError(
                400, "images are accepted in user messages only", param=f"{where}.content"
            )
    if request.stream_options is not None and not request.stream:
        raise ApiError(
            400, "stream_options may be given only when stream is true", param="stream_options"
        )
    if request.top_logprobs and not request.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")


def count_visuals(messages: list[Message]) -> tuple[int, int]:
    """Return how many pictures the messages hold, and how many frames of videos."""
    parts = [part for m in messages if isinstance(m.content, list) for part in m.content]
    num_images = sum(isinstance(part, ImagePart) for part in parts)
    return num_images, sum(len(part.video) for part in parts if isinstance(part, VideoPart))


def sampling_params(
    request: ChatRequest, form: AskedForm | None, max_new_tokens: int
) -> list[SamplingParams]:
    """Return the engine's parameters, for each answer its own where there is a seed.

    Args:
        request: The request.
        form: The form it asks for.
        max_new_tokens: Room in the context after the prompt: the default and the most.

    Raises:
        RequestError: if a value is out of range.
    """
    asked = request.max_completion_tokens or request.max_tokens or max_new_tokens
    stop = [request.stop] if isinstance(request.stop, str) else request.stop
    first = SamplingParams(
        max_tokens=max(1, min(asked, max_new_tokens)),
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        top_k=request.top_k or 0,
        min_p=request.min_p or 0.0,
        repetition_penalty=request.repetition_penalty or 1.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        presence_penalty=request.presence_penalty or 0.0,
        logit_bias=_logit_bias(request.logit_bias or {}),
        seed=request.seed,
        stop=tuple(stop or ()),
        stop_token_ids=tuple(request.stop_token_ids or ()),
        include_stop_str_in_output=bool(request.include_stop_str_in_output),
        min_tokens=request.min_tokens or 0,
        ignore_eos=bool(request.ignore_eos),
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        structured_outputs=None if form is None else form.params,
    )
    others = range(1, request.num_choices)
    if request.seed is None:
        return [first, *(first for _ in others)]
    seeds = ((request.seed + choice + 2**63) % 2**64 - 2**63 for choice in others)
    return [first, *(replace(first, seed=seed) for seed in seeds)]


def _logit_bias(bias: dict[str, float]) -> dict[int, float]:
    """Return a bias by token id; JSON has no numbers as keys."""
    for key in bias:
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            message = f"logit_bias must map token ids to numbers, got {shorten(key, 40)!r}"
            raise ApiError(400, message, param="logit_bias")
    return {int(key): value for key, value in bias.items()}


def completion_body(head: Json, choices: list[Json], usage: Usage) -> Json:
    """Return the body of a whole answer."""
    return head | {"object": "chat.completion", "choices": choices, "usage": usage}


def choice_body(index: int, text: str, finish_reason: str, logprobs: Json | None) -> Json:
    """Return one choice of a whole answer."""
    message = {"role": "assistant", "content": text, "refusal": None}
    return {
        "index": index,
        "message": message,
        "logprobs": logprobs,
        "finish_reason": finish_reason,
    }


def delta_body(
    index: int, delta: Json, finish_reason: str | None = None, logprobs: Json | None = None
) -> Json:
    """Return one choice of a stream chunk."""
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


def usage_body(outputs: Sequence[RequestOutput]) -> Usage:
    """Return token counts; the prompt's include the tokens of its pictures.

    Guesses are counted where there were some: openai's clients have fields for them. Cached is what
    no answer had to compute: of several, all but the first find their prompt in the cache.

    Args:
        outputs: The last output of each choice.
    """
    num_prompt_tokens = outputs[0].num_prompt_tokens
    num_completion_tokens = sum(output.num_completion_tokens for output in outputs)
    usage: Usage = {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_completion_tokens,
        "total_tokens": num_prompt_tokens + num_completion_tokens,
        "prompt_tokens_details": {"cached_tokens": min(one.num_cached_tokens for one in outputs)},
    }
    if num_draft_tokens := sum(output.num_draft_tokens for output in outputs):
        num_accepted_tokens = sum(output.num_accepted_tokens for output in outputs)
        usage["completion_tokens_details"] = {
            "accepted_prediction_tokens": num_accepted_tokens,
            "rejected_prediction_tokens": num_draft_tokens - num_accepted_tokens,
        }
    return usage


def logprobs_body(tokens: list[TokenLogprob]) -> Json:
    """Return the `logprobs` object of a choice."""
    content = [
        _token_body(token) | {"top_logprobs": [_token_body(other) for other in token.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def _token_body(token: TokenLogprob) -> Json:
    logprob = max(token.logprob, MIN_LOGPROB)
    return {"token": token.token, "logprob": logprob, "bytes": list(token.bytes)}
