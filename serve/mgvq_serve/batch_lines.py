"""Lines of a batch: OpenAI's request and response records, and which are answered (for `batch`).

A request line is `{"custom_id", "method": "POST", "url": "/v1/chat/completions", "body": {...}}`, a
response line `{"id", "custom_id", "response": {"status_code", "request_id", "body"}, "error"}`.
Where a request failed, `error` repeats the error object of the body; where a line was no request,
`response` is null. Nothing here knows what a body means.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mgvq_runtime.errors import ConfigError
from mgvq_serve.errors import shorten

CHAT_URL = "/v1/chat/completions"
ID_PREFIX = "batch_req_"
MAX_CUSTOM_ID_CHARS = 512
Record = dict[str, Any]


class BadLineError(Exception):
    """A line of the input that is no request.

    Args:
        number: which line, counted from 1.
        message: what is wrong with it.
        custom_id: its id, where it has one.
    """

    def __init__(self, number: int, message: str, custom_id: str | None = None) -> None:
        super().__init__(f"line {number}: {message}")
        self.number = number
        self.custom_id = custom_id

    def record(self) -> Record:
        """Return the response line."""
        error = {"code": "invalid_line", "message": str(self), "line": self.number}
        return _record(self.custom_id, None, error)


@dataclass(frozen=True)
class BatchLine:
    """One request of the input."""

    custom_id: str
    body: bytes
    """The body as JSON, for the same checks as a body over HTTP."""

    def record(self, status_code: int, body: Record) -> Record:
        """Return the response line."""
        response = {"status_code": status_code, "request_id": str(uuid.uuid4()), "body": body}
        return _record(self.custom_id, response, body.get("error"))


def parse_line(number: int, raw: bytes) -> BatchLine:
    """Read a line of the input.

    Raises:
        BadLineError: if it is not a chat request in OpenAI's batch format.
    """
    try:
        record = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise BadLineError(number, f"not JSON: {shorten(str(error), 200)}") from None
    if not isinstance(record, dict):
        raise BadLineError(number, f"expected an object, got {type(record).__name__}")
    custom_id = record.get("custom_id")
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= MAX_CUSTOM_ID_CHARS:
        message = f"custom_id must be a string of 1 to {MAX_CUSTOM_ID_CHARS} characters"
        raise BadLineError(number, message)
    for name, expected in (("method", "POST"), ("url", CHAT_URL)):
        if record.get(name) != expected:
            got = shorten(repr(record.get(name)), 100)
            raise BadLineError(number, f"{name} must be {expected!r}, got {got}", custom_id)
    body = record.get("body")
    if not isinstance(body, dict):
        got = type(body).__name__
        raise BadLineError(number, f"body must be an object, got {got}", custom_id)
    return BatchLine(custom_id, json.dumps(body).encode())


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file that are not blank, with their numbers, counted from 1."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if raw.strip():
                yield number, raw


class BatchOutput:
    """The file of responses; what an interrupted run left there is kept and not asked again."""

    def __init__(self, path: Path) -> None:
        """Read what is there; a last line that was cut off in writing is taken away.

        Raises:
            ConfigError: if the file holds anything but responses of a batch.
        """
        self.custom_ids: set[str] = set()
        """Requests that have a response."""
        self.bad_lines: set[int] = set()
        """Lines of the input that were reported to be no request."""
        self._file = path.open("a+b")
        try:
            self._read(path)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def write(self, record: Record) -> None:
        """Append a response; once this returns, a killed process does not lose it."""
        text = json.dumps(record, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        self._file.write(text.encode("utf-8", "replace") + b"\n")
        self._file.flush()
        self._note(record)

    def _read(self, path: Path) -> None:
        self._file.seek(0)
        end, raw = 0, b"\n"
        for number, raw in enumerate(self._file, start=1):
            try:
                self._note(json.loads(raw))
            except (ValueError, TypeError, KeyError):
                if not raw.endswith(b"\n") and _START.startswith(raw[: len(_START)]):
                    break  # cut off in writing
                raise ConfigError(
                    f"line {number} of {path} is no response of a batch; choose another output file"
                ) from None
            end += len(raw)
        self._file.truncate(end)
        if end and not raw.endswith(b"\n") and end == self._file.tell():
            self._file.write(b"\n")

    def _note(self, record: Any) -> None:
        """Remember that a line has its response.

        Raises:
            ValueError, TypeError, KeyError: if it is no response.
        """
        error, custom_id = record["error"], record["custom_id"]
        if not record["id"].startswith(ID_PREFIX):
            raise ValueError("not one of ours")
        if record["response"] is None:
            self.bad_lines.add(error["line"])
        else:
            self.custom_ids.add(custom_id)


def _record(custom_id: str | None, response: Record | None, error: Record | None) -> Record:
    name = f"{ID_PREFIX}{uuid.uuid4().hex}"
    return {"id": name, "custom_id": custom_id, "response": response, "error": error}


_START = f'{{"id":"{ID_PREFIX}'.encode()
