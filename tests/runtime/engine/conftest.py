"""Engines over one loaded tiny model: building another one costs only its key/value pool."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mgvq_runtime.config import EngineConfig
from mgvq_runtime.engine.engine import Engine
from mgvq_runtime.engine.startup import start

MakeEngine = Callable[..., Engine]


@pytest.fixture(scope="session")
def loaded_tiny_model(tiny_qwen2_vl_folder: Path) -> Any:
    return start(tiny_qwen2_vl_folder, EngineConfig(device="cpu", max_model_len=512))[:3]


@pytest.fixture
def make_engine(loaded_tiny_model: Any) -> MakeEngine:
    """Makes an engine; keywords replace fields of the resolved config."""
    model, processor, resolved = loaded_tiny_model

    def make(**changes: Any) -> Engine:
        return Engine(model, processor, replace(resolved, **changes))

    return make
