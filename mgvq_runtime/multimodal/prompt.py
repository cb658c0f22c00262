"""Placeholders and positions, on token ids (called by `multimodal.chat`).

Text never enters here: what a user wrote cannot become a placeholder.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mgvq_runtime.errors import RequestError
from mgvq_runtime.models.config import ModelConfig
from mgvq_runtime.request import ImageInput, Prompt


def build_prompt(ids: Sequence[int], images: Sequence[ImageInput], config: ModelConfig) -> Prompt:
    """Put pictures behind the placeholders of a conversation.

    Args:
        ids: Token ids with one placeholder an image.
        images: What the family's image processor made of the pictures, in order.
        config: Of the model the prompt is for.

    Raises:
        RequestError: if placeholders and pictures differ in number.
    """
    if config.vision_config is None or config.image_token_id is None:
        assert not images, "a model without a vision tower takes no pictures"
        return Prompt.from_token_ids(list(ids))
    counts = [image.num_tokens for image in images]
    token_ids = expand_image_tokens(ids, counts, config.image_token_id)
    if not config.has_grid_positions:
        return Prompt.from_token_ids(token_ids, tuple(images))
    grids = [image.grid_thw for image in images]
    merge_size = config.vision_config.spatial_merge_size
    positions, delta = mrope_positions(token_ids, grids, config.image_token_id, merge_size)
    return Prompt(token_ids, tuple(images), positions, delta)


def expand_image_tokens(
    ids: Sequence[int], num_tokens: Sequence[int], image_token_id: int
) -> list[int]:
    """Repeat each image placeholder as often as its image has tokens.

    Args:
        ids: Token ids with one placeholder an image.
        num_tokens: Tokens of each image, in order.
        image_token_id: The placeholder.

    Returns:
        Token ids with every image's placeholders in place.

    Raises:
        RequestError: if there are more or fewer placeholders than images.
    """
    found = sum(token == image_token_id for token in ids)
    if found != len(num_tokens):
        raise RequestError(
            f"the conversation has {found} image placeholders for {len(num_tokens)} images",
            param="messages",
        )
    counts = iter(num_tokens)
    expanded: list[int] = []
    for token in ids:
        if token == image_token_id:
            expanded.extend([token] * next(counts))
        else:
            expanded.append(token)
    return expanded


def mrope_positions(
    ids: Sequence[int],
    grids: Sequence[tuple[int, int, int]],
    image_token_id: int,
    merge_size: int,
) -> tuple[npt.NDArray[np.int64], int]:
    """Compute the three positions of every token.

    Text counts up on all axes alike. An image that begins at position p has p + its frame, row and
    column (of merged patches); the text after it goes on at p + the larger of rows and columns.

    Args:
        ids: T token ids, placeholders expanded.
        grids: Patches along time, height and width of each image, in order.
        image_token_id: The placeholder.
        merge_size: Patches along each side of one merged patch.

    Returns:
        Positions `[3, T]` int64, and the position of the next token minus T.

    Raises:
        RequestError: if the placeholders are not those of the grids.

    Source: arXiv 2409.12191, section 2.1; transformers 5.23 `Qwen2VLModel.get_rope_index`.
    """
    T = len(ids)
    is_image = np.asarray(ids, dtype=np.int64) == image_token_id  # [T]
    parts: list[npt.NDArray[np.int64]] = []
    start = position = 0
    for t, height, width in grids:
        rows, columns = height // merge_size, width // merge_size
        begin = start + int(np.argmax(is_image[start:])) if start < T else T
        end = begin + t * rows * columns
        if end > T or not is_image[begin:end].all():
            raise RequestError("image placeholders do not match the images", param="messages")
        parts.append(_text(position, begin - start))
        position += begin - start
        grid = np.indices((t, rows, columns)).reshape(3, -1)  # [3, t*rows*columns]
        parts.append(grid + position)
        position += max(rows, columns)
        start = end
    if is_image[start:].any():
        raise RequestError("there are more image placeholders than images", param="messages")
    parts.append(_text(position, T - start))
    positions = np.concatenate(parts, axis=1).astype(np.int64)  # [3, T]
    delta = int(positions.max()) + 1 - T if T else 0
    return positions, delta


def _text(position: int, length: int) -> npt.NDArray[np.int64]:
    """Return `[3, length]`: the same count on every axis."""
    axis = np.arange(position, position + length, dtype=np.int64)
    return np.stack((axis, axis, axis))
