"""What a client is told when a request fails (raised everywhere here, answered by `app`).

One class, `ApiError`, carries the status and the OpenAI error object. Every fault of the client is
a 4xx that official clients do not retry; a 5xx never says more than that the server failed. The
runtime's own exceptions become `ApiError` in `from_runtime_error`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mgvq_runtime.errors import (
    ContextLengthError,
    EngineDeadError,
    ImageError,
    MgvqError,
    RequestError,
)

MAX_MESSAGE_CHARS = 600


class ApiError(Exception):
    """A failed request: an HTTP status and the error object of its body."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        error_type: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """Describe a failure.

        Args:
            status: HTTP status.
            message: What was expected, what came, and what to do; shortened to 600 characters.
            error_type: OpenAI's `type`.
            code: OpenAI's `code`: a word, never a number.
            param: The field at fault, such as `messages[0].content[1].image_url.url`.
            headers: More response headers, such as Retry-After.
            extra: More members of the error object.
        """
        super().__init__(message)
        self.status = status
        self.message = shorten(message, MAX_MESSAGE_CHARS)
        self.error_type = error_type
        self.code = code
        self.param = param
        self.headers = dict(headers or {})
        self.extra = dict(extra or {})

    def body(self) -> dict[str, Any]:
        """Return the JSON body, `{"error": {"message", "type", "param", "code"}}`."""
        error = {
            "message": self.message,
            "type": self.error_type,
            "param": self.param,
            "code": self.code,
        }
        return {"error": error | self.extra}


def unsupported(param: str, what: str) -> ApiError:
    """Return the 400 for a field that is known and not supported in this release."""
    return ApiError(400, f"{what} not supported in this release", param=param, code="unsupported")


def unavailable(message: str, code: str) -> ApiError:
    """Return the 503 for a server that cannot take requests; clients try again later."""
    return ApiError(
        503, message, error_type="unavailable_error", code=code, headers={"Retry-After": "5"}
    )


def internal_error(message: str = "The server failed to answer this request.") -> ApiError:
    """Return the 500 that official clients do not retry."""
    headers = {"x-should-retry": "false"}
    return ApiError(500, message, error_type="server_error", code="internal_error", headers=headers)


def timed_out(message: str) -> ApiError:
    """Return the 503 of a request that took too long; another try would only add to the load."""
    headers = {"x-should-retry": "false"}
    return ApiError(
        503, message, error_type="unavailable_error", code="request_timeout", headers=headers
    )


def from_runtime_error(error: MgvqError, param: str | None = None) -> ApiError:
    """Translate an exception of `mgvq_runtime`.

    Args:
        error: What the runtime raised.
        param: The field at fault where the exception does not name one.
    """
    if isinstance(error, ContextLengthError):
        return ApiError(
            400,
            f"This model's maximum context length is {error.max_model_len} tokens, and the "
            f"messages with their images take {error.num_prompt_tokens}. Shorten the conversation "
            "or send fewer or smaller images.",
            error_type="exceed_context_size_error",
            code="context_length_exceeded",
            param="messages",
            extra={"n_prompt_tokens": error.num_prompt_tokens, "n_ctx": error.max_model_len},
        )
    if isinstance(error, ImageError):
        return ApiError(400, str(error), param=error.param or param, code="invalid_image")
    if isinstance(error, RequestError):
        return ApiError(400, str(error), param=error.param or param, code=error.code)
    if isinstance(error, EngineDeadError):
        return engine_dead()
    return internal_error()


def engine_dead() -> ApiError:
    """Return the 503 of a server whose engine thread has ended."""
    return unavailable("The engine has stopped after a failure; restart the server.", "engine_dead")


def shorten(text: str, limit: int) -> str:
    """Return `text`, its middle cut out where it is longer than `limit` characters."""
    if len(text) <= limit:
        return text
    half = (limit - 5) // 2
    return f"{text[:half]} ... {text[-half:]}"
