"""Images and text in, tokens out: the runtime of MGVQ checkpoints.

In: a checkpoint folder, pictures and messages. Out: text, token by token.
Start at `mgvq_runtime.llm.LLM.chat`, then `mgvq_runtime.engine.engine.Engine.step`.
This room never speaks HTTP (that is `mgvq_serve`, in front of it) and never quantizes. Next room
down: `mgvq_kernels`, the arithmetic. Every name below is resolved on first use (PEP 562), so that
importing the checkpoint reader does not load the engine.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOME_OF = {
    "ChatReply": "mgvq_runtime.llm",
    "EncodedImage": "mgvq_runtime.multimodal.image",
    "Engine": "mgvq_runtime.engine.engine",
    "EngineConfig": "mgvq_runtime.config",
    "FinishReason": "mgvq_runtime.request",
    "LLM": "mgvq_runtime.llm",
    "MediaLimits": "mgvq_runtime.multimodal.image",
    "Prompt": "mgvq_runtime.request",
    "Request": "mgvq_runtime.request",
    "RequestOutput": "mgvq_runtime.request",
    "SamplingParams": "mgvq_runtime.request",
    "StructuredOutputsParams": "mgvq_runtime.structured_outputs",
    "TokenLogprob": "mgvq_runtime.request",
    "add_config_arguments": "mgvq_runtime.config",
    "config_from_arguments": "mgvq_runtime.config",
    "demo_checkpoint_path": "mgvq_runtime.assets",
    "demo_picture_paths": "mgvq_runtime.assets",
    "open_data_url": "mgvq_runtime.multimodal.image",
    "open_image": "mgvq_runtime.multimodal.image",
}

if TYPE_CHECKING:
    from mgvq_runtime.assets import demo_checkpoint_path, demo_picture_paths
    from mgvq_runtime.config import EngineConfig, add_config_arguments, config_from_arguments
    from mgvq_runtime.engine.engine import Engine
    from mgvq_runtime.llm import LLM, ChatReply
    from mgvq_runtime.multimodal.image import (
        EncodedImage,
        MediaLimits,
        open_data_url,
        open_image,
    )
    from mgvq_runtime.request import (
        FinishReason,
        Prompt,
        Request,
        RequestOutput,
        SamplingParams,
        TokenLogprob,
    )
    from mgvq_runtime.structured_outputs import StructuredOutputsParams

__all__ = [
    "LLM",
    "ChatReply",
    "EncodedImage",
    "Engine",
    "EngineConfig",
    "FinishReason",
    "MediaLimits",
    "Prompt",
    "Request",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "TokenLogprob",
    "__version__",
    "add_config_arguments",
    "config_from_arguments",
    "demo_checkpoint_path",
    "demo_picture_paths",
    "open_data_url",
    "open_image",
]


def __getattr__(name: str) -> object:
    """Resolve a public name on first use."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'mgvq_runtime' has no attribute {name!r}")
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
