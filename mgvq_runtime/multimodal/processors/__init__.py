"""One image processor a family: decoded pictures in, patches and their token count out.

Start at `processors.qwen2_vl.Qwen2VLImageProcessor`; `processors.base` says what all of them do.
Never decodes bytes: that is `multimodal.image`. Called by `multimodal.chat`.
"""

from mgvq_runtime.multimodal.processors.base import ImageProcessor

__all__ = ["ImageProcessor"]
