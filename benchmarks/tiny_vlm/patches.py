"""Pixels to patches, exactly as transformers' Qwen2-VL image processor (by `train`, `evaluate`)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
PATCH, MERGE = 14, 2


def to_patches(images: np.ndarray, dtype: torch.dtype) -> Tensor:
    """Normalise and cut pictures of one size.

    Args:
        images: `[N, H, W, 3]` uint8, H and W multiples of 28.
        dtype: of the result.

    Returns:
        `[N, H * W / 196, 588]`, rows in merge order, each (channel, y, x); the second frame of
        Qwen2-VL's patches is the same again and left out.
    """
    N, H, W, _ = images.shape
    pixels = torch.from_numpy(images).float() / 255
    pixels = (pixels - torch.tensor(MEAN)) / torch.tensor(STD)
    rows, columns = H // PATCH, W // PATCH
    shape = (N, rows // MERGE, MERGE, PATCH, columns // MERGE, MERGE, PATCH, 3)
    ordered = pixels.view(shape).permute(0, 1, 4, 2, 5, 7, 3, 6)
    return ordered.reshape(N, rows * columns, 3 * PATCH * PATCH).to(dtype)
