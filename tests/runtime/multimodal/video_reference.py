"""What transformers makes of the frames of a video, without torchvision, which it would need.

Its video processors resize with torchvision and do the rest with torch. Here PIL resizes, as
transformers' picture processors do, and the rest is theirs: the cutting of Qwen2-VL's own method,
the other families' of their picture processors, which treat a frame as the video processors do.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from mgvq_runtime.multimodal.processors.internvl2 import InternVL2ImageProcessor
from mgvq_runtime.multimodal.processors.llava_onevision import LlavaOnevisionImageProcessor
from mgvq_runtime.multimodal.processors.qwen2_vl import Qwen2VLImageProcessor
from tests.runtime.multimodal.tiled_sizes import random_picture


def random_frames(count: int, width: int, height: int, seed: int = 0) -> list[Image.Image]:
    """Return frames that all differ."""
    return [random_picture(width, height, 100 * seed + i) for i in range(count)]


def qwen2_vl_patchify() -> Any:
    """Return `Qwen2VLVideoProcessor.patchify`; an empty torchvision stands in for the import."""
    import transformers

    names = ["torchvision", "torchvision.transforms", "torchvision.transforms.v2"]
    names.append("torchvision.transforms.v2.functional")
    added = [name for name in names if name not in sys.modules]
    assert transformers.Qwen2VLProcessor is not None  # what is there has been looked up by now
    for name in added:
        sys.modules[name] = types.ModuleType(name)
    try:
        name = "transformers.models.qwen2_vl.video_processing_qwen2_vl"
        return importlib.import_module(name).Qwen2VLVideoProcessor.patchify
    finally:
        for name in added:
            del sys.modules[name]


def qwen2_vl_video(
    processor: Qwen2VLImageProcessor, frames: Sequence[Image.Image], max_pixels: int | None = None
) -> tuple[torch.Tensor, list[int]]:
    """Return patches and the grid; `max_pixels` of a frame are the processor's where not given."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    most = processor.frame_max_pixels if max_pixels is None else max_pixels
    height, width = smart_resize(
        frames[0].height, frames[0].width, 28, processor.frame_min_pixels, most
    )
    resized = [frame.resize((width, height), Image.Resampling.BICUBIC) for frame in frames]
    pixels = torch.from_numpy(np.stack([np.asarray(frame) for frame in resized])) / 255
    rule = processor.video_pixels
    pixels = (pixels - torch.tensor(rule.mean)) / torch.tensor(rule.std)  # [F, height, width, 3]
    patches, t, h, w = qwen2_vl_patchify()(None, pixels.permute(0, 3, 1, 2)[None], 14, 2, 2)
    return patches[0], [t, h, w]


def llava_video(
    processor: LlavaOnevisionImageProcessor, frames: Sequence[Image.Image]
) -> torch.Tensor:
    """Return `pixel_values_videos [1, F, 3, side, side]`: the whole of each frame, stretched."""
    from transformers import LlavaOnevisionImageProcessorPil

    side = processor.tile_size
    images = LlavaOnevisionImageProcessorPil(
        image_mean=list(processor.video_pixels.mean),
        image_std=list(processor.video_pixels.std),
        size={"height": side, "width": side},
        image_grid_pinpoints=[[side, side]],
    )
    tiles = [images([frame], return_tensors="np")["pixel_values"][0][0] for frame in frames]
    return torch.from_numpy(np.stack(tiles))[None]


def internvl_video(
    processor: InternVL2ImageProcessor, frames: Sequence[Image.Image]
) -> torch.Tensor:
    """Return `pixel_values [F, 3, side, side]`: one tile a frame."""
    from transformers import GotOcr2ImageProcessorPil

    side = processor.tile_size
    images = GotOcr2ImageProcessorPil(
        image_mean=list(processor.video_pixels.mean),
        image_std=list(processor.video_pixels.std),
        size={"height": side, "width": side},
        crop_to_patches=False,
    )
    return torch.from_numpy(images(list(frames), return_tensors="np")["pixel_values"])
