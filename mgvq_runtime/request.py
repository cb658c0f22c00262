"""What a request asks and what it gets back (shared by the chat processor, the engine and serve).

Plain values only: no tensors of torch, no model, no file. Images arrive here as patches, already
decoded and cut by `mgvq_runtime.multimodal`.
"""

from __future__ import annotations

import hashlib
import math
import numbers
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from mgvq_runtime.errors import RequestError
from mgvq_runtime.structured_outputs import StructuredOutputsParams

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_SEED = 2**63 - 1
MAX_LOGIT_BIAS = 100.0
SAMPLING_EPS = 1e-5
"""Temperatures below this are greedy, as in vLLM; float32 rounds the smallest of them to 0."""
MAX_SHOWN_CHARS = 60


@dataclass(frozen=True)
class TileLayout:
    """How the tiles of one picture lie side by side, and what of them is kept."""

    rows: int
    """Tiles one above the other; the tile of the whole picture, which comes first, is extra."""
    columns: int
    """Tiles side by side."""
    kept: tuple[int, int]
    """Rows and columns of patches left when the padding is cut off, around the middle."""
    shrunk: tuple[int, int]
    """Rows and columns of patches those are interpolated to; the same where they are few."""


@dataclass(frozen=True)
class FrameLayout:
    """What is kept of the frames of a video, which stand one behind the other."""

    side: int
    """Rows and columns of patches each frame is interpolated to."""


Layout = TileLayout | FrameLayout
"""Where a family puts the tiles of a picture, or the frames of a video, together again."""


@dataclass(frozen=True, eq=False)
class ImageInput:
    """One picture or video, ready for the vision tower."""

    patches: npt.NDArray[np.float32]
    """`[P, C*temporal*patch*patch]` float32, in the order the family's vision tower expects."""
    grid_thw: tuple[int, int, int]
    """Frames or tiles, and patches along height and width of one; their product is P."""
    num_tokens: int
    """Placeholders this picture takes in the prompt."""
    layout: Layout | None = None
    """What is done with the tiles before the decoder sees them; None leaves them in a row."""
    is_video: bool = False
    """Whether it stands behind the placeholder of videos."""

    @property
    def num_patches(self) -> int:
        """P, the rows of `patches`."""
        return len(self.patches)

    @cached_property
    def digest(self) -> bytes:
        """256 bits of everything the model sees of this picture; read once, it costs a pass."""
        shape = (self.grid_thw, self.num_tokens, self.layout, self.is_video, self.patches.shape)
        digest = hashlib.blake2b(repr(shape).encode(), digest_size=32)
        digest.update(np.ascontiguousarray(self.patches).data)
        return digest.digest()


@dataclass(frozen=True, eq=False)
class Prompt:
    """Token ids with placeholders expanded, the pictures behind them, positions of all tokens."""

    token_ids: list[int]
    images: tuple[ImageInput, ...]
    positions: npt.NDArray[np.int64]
    """`[3, T]` int64: time, height and width position of each prompt token."""
    position_delta: int
    """Position of the first generated token minus the number of prompt tokens."""

    @classmethod
    def from_token_ids(cls, token_ids: list[int], images: tuple[ImageInput, ...] = ()) -> Prompt:
        """Return a prompt whose positions count up, on all three axes alike."""
        axis = np.arange(len(token_ids), dtype=np.int64)
        return cls(list(token_ids), images, np.stack([axis, axis, axis]), 0)


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen and when to stop.

    Numbers of numpy are taken and kept as Python's own; None is an empty list or mapping.

    Raises:
        RequestError: if a field is out of range; `.param` names the field.
    """

    max_tokens: int = 128
    """Most tokens to generate; clamped to what is left of the context."""
    temperature: float = 1.0
    """0, or anything below 1e-5, is greedy: the most probable token, always."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches this."""
    top_k: int = 0
    """Keep this many tokens; 0 or -1 keeps all."""
    min_p: float = 0.0
    """Drop tokens less probable than this share of the most probable one."""
    repetition_penalty: float = 1.0
    """Above 1 weakens tokens that prompt or answer have already; 1 is off."""
    frequency_penalty: float = 0.0
    """Taken off a token's logit for each time the answer has it."""
    presence_penalty: float = 0.0
    """Taken off the logit of every token that the answer has."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these tokens, from -100 to 100."""
    seed: int | None = None
    """The same seed, prompt and parameters give the same text, whatever else is running."""
    stop: tuple[str, ...] = ()
    """Strings that end the answer; the text ends before them."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end the answer, besides the model's own end tokens."""
    include_stop_str_in_output: bool = False
    """Keep the stop string, or the text of the stop token, at the end of the text."""
    min_tokens: int = 0
    """Tokens before which nothing ends the answer but max_tokens or the end of its form."""
    ignore_eos: bool = False
    """Go on past the model's end token, up to max_tokens."""
    logprobs: int | None = None
    """None: off. 0: of the chosen token. n: also of the n most probable tokens."""
    structured_outputs: StructuredOutputsParams | None = None
    """The form the whole text must have; the answer ends where the form is complete."""

    def __post_init__(self) -> None:
        _keep_int(self, "max_tokens", 1, None)
        _keep_float(self, "temperature", 0.0, 100.0)
        _keep_float(self, "top_p", 0.0, 1.0)
        if self.top_p == 0.0:
            raise RequestError("top_p must be greater than 0 and at most 1, got 0", param="top_p")
        _keep_int(self, "top_k", -1, None)
        _keep_float(self, "min_p", 0.0, 1.0)
        _keep_float(self, "repetition_penalty", 0.01, 100.0)
        _keep_float(self, "frequency_penalty", -2.0, 2.0)
        _keep_float(self, "presence_penalty", -2.0, 2.0)
        object.__setattr__(self, "logit_bias", _checked_bias(self.logit_bias))
        _keep_int(self, "min_tokens", 0, self.max_tokens)
        if self.seed is not None:
            _keep_int(self, "seed", -MAX_SEED - 1, MAX_SEED)
        if self.logprobs is not None:
            _keep_int(self, "logprobs", 0, MAX_LOGPROBS)
        self._keep_stop()
        form = self.structured_outputs
        if form is not None and not isinstance(form, StructuredOutputsParams):
            raise RequestError(
                f"structured_outputs must be StructuredOutputsParams, got {type(form).__name__}",
                param="structured_outputs",
            )

    def _keep_stop(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else _listed("stop", self.stop)
        if len(stop) > MAX_STOP_STRINGS:
            raise RequestError(
                f"stop takes at most {MAX_STOP_STRINGS} strings, got {len(stop)}", param="stop"
            )
        for text in stop:
            if not isinstance(text, str) or not text:
                raise RequestError(
                    f"stop must hold strings that are not empty, got {_shown(text)}", param="stop"
                )
        name = "stop_token_ids"
        ids = tuple(_checked_int(name, one, 0, None) for one in _listed(name, self.stop_token_ids))
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, name, ids)

    @property
    def is_greedy(self) -> bool:
        """Whether the most probable token is taken without drawing."""
        return self.temperature < SAMPLING_EPS

    @property
    def has_penalty(self) -> bool:
        """Whether the tokens so far make a difference to the next."""
        penalties = (self.repetition_penalty, self.frequency_penalty, self.presence_penalty)
        return penalties != (1.0, 0.0, 0.0)


class FinishReason(Enum):
    """Why a request ended; "stop" and "length" are the words on the wire."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    TIMEOUT = "timeout"
    ERROR = "error"


@dataclass(frozen=True, eq=False)
class Request:
    """One question to the engine."""

    request_id: str
    """Unique among the requests that have not ended."""
    prompt: Prompt
    sampling_params: SamplingParams
    cache_salt: str | None = None
    """Requests with different salts share neither keys and values nor picture embeddings."""
    priority: int = 0
    """Lower numbers are served first; among equals, whoever came first."""
    timeout_s: float | None = None
    """Seconds after which the request ends, in whatever state it is; None is never."""

    def __post_init__(self) -> None:
        if self.cache_salt is not None and not isinstance(self.cache_salt, str):
            raise RequestError(
                f"cache_salt must be a string, got {self.cache_salt!r}", param="cache_salt"
            )
        _keep_int(self, "priority", -MAX_SEED - 1, MAX_SEED)
        if self.timeout_s is not None:
            _keep_float(self, "timeout_s", 0.0, float(MAX_SEED))


@dataclass(frozen=True)
class TokenLogprob:
    """Natural-log probability of one token under the model's unfiltered distribution."""

    token_id: int
    token: str
    """The token as text; a part of a character decodes to the replacement character."""
    bytes: bytes
    """The token's own bytes: joined over tokens they are valid UTF-8."""
    logprob: float
    top: tuple[TokenLogprob, ...] = ()
    """The most probable tokens at this place, best first; empty for the entries inside `top`."""


@dataclass(frozen=True)
class RequestOutput:
    """What one step adds to one request."""

    request_id: str
    text: str
    """Text that can no longer change, since the last output of this request."""
    token_ids: tuple[int, ...]
    """Tokens generated since the last output, an end token included."""
    logprobs: tuple[TokenLogprob, ...] | None
    """One entry a token of `token_ids`, or None where they were not asked for."""
    finish_reason: FinishReason | None
    """None while the request goes on; the last output of a request has one."""
    num_prompt_tokens: int
    num_completion_tokens: int
    num_cached_tokens: int
    """Prompt tokens whose keys and values were already in the cache."""
    error: str | None = None
    """What went wrong, where finish_reason is ERROR or TIMEOUT."""
    num_draft_tokens: int = 0
    """Tokens that were guessed ahead for this request so far."""
    num_accepted_tokens: int = 0
    """Those of them that were right."""
    error_code: str | None = None
    """A stable word for the error where the request is at fault, such as "form_too_complex"."""


def _keep_int(owner: object, name: str, low: int, high: int | None) -> None:
    object.__setattr__(owner, name, _checked_int(name, getattr(owner, name), low, high))


def _keep_float(owner: object, name: str, low: float, high: float) -> None:
    object.__setattr__(owner, name, _checked_float(name, getattr(owner, name), low, high))


def _checked_int(name: str, value: Any, low: int, high: int | None) -> int:
    """Return a whole number of any type as an int; True is none, and 5.0 neither."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise RequestError(f"{name} must be an integer, got {_shown(value)}", param=name)
    if number < low or (high is not None and number > high):
        allowed = f"at least {low}" if high is None else f"from {low} to {high}"
        raise RequestError(f"{name} must be {allowed}, got {_shown(number)}", param=name)
    return number


def _checked_float(name: str, value: Any, low: float, high: float) -> float:
    """Return a real number of any type as a float; True is none."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise RequestError(f"{name} must be a number, got {_shown(value)}", param=name)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not low <= number <= high:  # nor is NaN
        raise RequestError(
            f"{name} must be from {low:g} to {high:g}, got {_shown(value)}", param=name
        )
    return number


def _checked_bias(bias: Any) -> dict[int, float]:
    """Return a copy of a bias: later changes to the caller's do not reach a running request."""
    name = "logit_bias"
    if bias is None:
        return {}
    if not isinstance(bias, Mapping):
        raise RequestError(
            f"{name} must map token ids to numbers, got {type(bias).__name__}", param=name
        )
    return {
        _checked_int(name, token_id, 0, None): _checked_float(
            name, value, -MAX_LOGIT_BIAS, MAX_LOGIT_BIAS
        )
        for token_id, value in bias.items()
    }


def _listed(name: str, value: Any) -> tuple[Any, ...]:
    try:
        return () if value is None else tuple(value)
    except TypeError:
        raise RequestError(f"{name} must be a list, got {_shown(value)}", param=name) from None


def _shown(value: Any) -> str:
    """Return a value as an error shows it: cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python prints no integer of more than 4300 digits
        text = "an integer of thousands of digits"
    return text if len(text) <= MAX_SHOWN_CHARS else f"{text[:MAX_SHOWN_CHARS]}..."
