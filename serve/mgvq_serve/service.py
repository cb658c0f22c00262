"""Puts the parts of a `ChatService` together (called by `app` for a server, by `batch` for a file).

What each part does is its own file's business; here is only which one gets what.
"""

from __future__ import annotations

import time
from typing import Protocol

from mgvq_serve.admission import Admission
from mgvq_serve.chat import ChatService, GrammarCompiler, PromptBuilder, ServedModel
from mgvq_serve.engine_thread import EngineLike, EngineThread
from mgvq_serve.media import ImageLoader
from mgvq_serve.settings import ServerSettings

MAX_OPEN_BODIES = 4  # bodies of the largest size that may be held at the same time


class ServableEngine(EngineLike, Protocol):
    """What a service needs of `mgvq_runtime.Engine`."""

    @property
    def chat_processor(self) -> PromptBuilder:
        """Turns messages and pictures into prompts."""

    @property
    def grammars(self) -> GrammarCompiler:
        """Compiles forms of answers."""

    @property
    def max_model_len(self) -> int:
        """Longest prompt plus answer, in tokens."""


def build_service(
    engine: ServableEngine, settings: ServerSettings, model_name: str, max_num_seqs: int
) -> ChatService:
    """Return a service around an engine; its thread is started by whoever owns the event loop.

    Args:
        engine: A loaded engine. From the thread's start on, only the thread touches it.
        settings: Limits.
        model_name: Name of the model on the wire.
        max_num_seqs: Requests the engine runs at the same time.
    """
    max_open_bytes = MAX_OPEN_BODIES * int(settings.max_body_mb * 1e6)
    return ChatService(
        ServedModel(model_name, engine.max_model_len, int(time.time())),
        EngineThread(engine),
        engine.chat_processor,
        engine.grammars,
        ImageLoader(settings.media_limits(), settings.allowed_local_media_path),
        Admission(max_num_seqs, settings.max_queue, max_open_bytes),
        settings,
    )
