"""Every error this project raises on purpose (raised in all rooms, turned into HTTP by serve).

    MgvqError
    |-- CheckpointError      (ValueError)    a checkpoint folder is missing, damaged or not ours
    |-- ConfigError          (ValueError)    a setting or a model's config.json makes no sense
    |-- TokenizerError       (ValueError)    tokenizer files or chat template cannot be used
    |-- ImageError           (ValueError)    a picture cannot be decoded, or is over the limits
    |-- RequestError         (ValueError)    a request asks what cannot be done; names the field
    |   `-- ContextLengthError               prompt and answer do not fit into the context
    `-- EngineDeadError      (RuntimeError)  the engine stopped; only a restart helps

A message says what was expected, what came, where, and what to do next. `mgvq_kernels`, below,
raises plain ValueError, TypeError and NotImplementedError.
"""

from __future__ import annotations

from collections.abc import Sequence

MAX_LISTED_PROBLEMS = 20


class MgvqError(Exception):
    """Root of every error raised on purpose."""


class CheckpointError(MgvqError, ValueError):
    """A checkpoint folder cannot be used; the message lists every problem that was found.

    Args:
        message: what is wrong, in one sentence.
        problems: one sentence a problem; the first 20 are printed, `.problems` keeps all.
    """

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        self.problems = tuple(problems)
        lines = [message, *(f"  - {problem}" for problem in problems[:MAX_LISTED_PROBLEMS])]
        if len(problems) > MAX_LISTED_PROBLEMS:
            lines.append(f"  ... and {len(problems) - MAX_LISTED_PROBLEMS} more")
        super().__init__("\n".join(lines))


class ConfigError(MgvqError, ValueError):
    """A setting, or a field of a model's config.json, has a value that cannot work."""


class TokenizerError(MgvqError, ValueError):
    """Tokenizer files or the chat template are missing, malformed or of an unknown kind."""


class ImageError(MgvqError, ValueError):
    """A picture cannot be decoded, or is larger than the limits allow.

    Args:
        message: what is wrong.
        param: where the picture came from, as the client spelled it.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class RequestError(MgvqError, ValueError):
    """A request cannot be served as it was written.

    Args:
        message: what is wrong and what would be right.
        param: the field of the request, as the client spelled it.
        code: a stable word for programs, such as "context_length_exceeded".
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class ContextLengthError(RequestError):
    """A prompt, with the answer it asks for, is longer than the model's context.

    Args:
        num_prompt_tokens: tokens of the prompt, pictures expanded.
        max_model_len: tokens of prompt and answer together that this engine serves.
        message: replaces the sentence made from the two numbers.
    """

    def __init__(
        self, num_prompt_tokens: int, max_model_len: int, message: str | None = None
    ) -> None:
        super().__init__(
            message
            or f"the prompt has {num_prompt_tokens} tokens and this engine serves at most "
            f"{max_model_len}, prompt and answer together: shorten it, send smaller pictures, "
            "or start with a larger max_model_len",
            param="messages",
            code="context_length_exceeded",
        )
        self.num_prompt_tokens = num_prompt_tokens
        self.max_model_len = max_model_len


class EngineDeadError(MgvqError, RuntimeError):
    """The engine met an error it cannot recover from; every later call raises this."""
