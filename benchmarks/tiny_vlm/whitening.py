"""First weights of the patch embedding: whitened principal components (called by `train`).

Nearly all variance of a 14x14 patch is its mean colour; with random weights the tower learns
colours at once and edges only slowly. Whitened components make the edges as loud as the colour
(patches of shapes named right after 212 steps of 30 pictures: 34 % against 26 %).
"""

from __future__ import annotations

from random import Random

import numpy as np
import torch

from benchmarks.tiny_vlm.assets import Assets
from benchmarks.tiny_vlm.drawing import draw
from benchmarks.tiny_vlm.model import TinyVLM
from benchmarks.tiny_vlm.patches import to_patches

KINDS = ("shapes", "word", "number", "emoji", "chart")


def whiten_patch_embedding(model: TinyVLM, assets: Assets, seed: int, pictures: int = 40) -> None:
    """Set the patch embedding from the patches of some training pictures of each kind."""
    images = [
        draw(Random(f"whitening/{seed}/{kind}/{number}"), assets, kind, (112, 112)).pixels
        for kind in KINDS
        for number in range(pictures)
    ]
    patches = to_patches(np.stack(images), torch.float32).flatten(0, 1)  # [n, 588]
    variances, components = torch.linalg.eigh(patches.T @ patches / len(patches))
    width = model.config.vision_dim
    variances = variances.flip(0)[:width]
    components = components.flip(1)[:, :width]
    floor = 0.3 * variances[width // 3]
    rows = (components / torch.sqrt(variances + floor)).T  # [D, 588]
    weight = model.visual.patch_embed["proj"].weight
    patch = model.config.patch_size
    with torch.no_grad():  # the two equal frames of a still picture share the weight
        weight.copy_((rows / 2).view(width, 3, 1, patch, patch).expand(weight.shape))
