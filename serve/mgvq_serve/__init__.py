"""HTTP in front of the engine: OpenAI chat requests in, answers about pictures out.

In: JSON with text and data-URL pictures. Out: JSON, or server-sent events token by token.
Start at `mgvq_serve.app.create_app`, then `mgvq_serve.chat.ChatService.open`.
This room never runs a model and never reads a checkpoint: one thread (`engine_thread`) hands
requests to `mgvq_runtime.Engine`, the next room down, of which only the front door is known here.
Names are resolved on first use (PEP 562), so that importing this package loads no web framework.
"""

from importlib import import_module
from typing import TYPE_CHECKING

_HOME_OF = {"create_app": "mgvq_serve.app", "main": "mgvq_serve.cli"}

if TYPE_CHECKING:
    from mgvq_serve.app import create_app
    from mgvq_serve.cli import main

__all__ = ["create_app", "main"]


def __getattr__(name: str) -> object:
    """Resolve a public name on first use."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'mgvq_serve' has no attribute {name!r}")
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
