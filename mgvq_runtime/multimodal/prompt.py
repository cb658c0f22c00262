"""Placeholders and positions, on token ids (called by `multimodal.chat`).

Text never enters here: what a user wrote cannot become a placeholder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from mgvq_runtime.errors import RequestError
from mgvq_runtime.models.config import ModelConfig
from mgvq_runtime.request import ImageInput, Prompt


def build_prompt(ids: Sequence[int], images: Sequence[ImageInput], config: ModelConfig) -> Prompt:
    """Put pictures and videos behind the placeholders of a conversation.

    Args:
        ids: Token ids with one placeholder an image.
        images: What the family's image processor made of pictures and videos, each kind in order.
        config: Of the model the prompt is for.

    Raises:
        RequestError: if placeholders and images differ in number.
    """
    if config.vision_config is None or config.image_token_id is None:
        assert not images, "a model without a vision tower takes no pictures"
        return Prompt.from_token_ids(list(ids))
    waiting: dict[int, list[ImageInput]] = {token: [] for token in config.placeholder_ids}
    for image in images:
        placeholder = config.video_token_id if image.is_video else config.image_token_id
        assert placeholder is not None, "a model without a placeholder of videos takes none"
        waiting[placeholder].append(image)
    token_ids, placed = expand_placeholders(ids, waiting)
    if not config.has_grid_positions:
        return Prompt.from_token_ids(token_ids, placed)
    grids = [image.grid_thw for image in placed]
    merge_size = config.vision_config.spatial_merge_size
    positions, delta = mrope_positions(token_ids, grids, config.placeholder_ids, merge_size)
    return Prompt(token_ids, placed, positions, delta)


def expand_placeholders(
    ids: Sequence[int], waiting: Mapping[int, Sequence[ImageInput]]
) -> tuple[list[int], tuple[ImageInput, ...]]:
    """Repeat each placeholder as often as its image has tokens.

    Args:
        ids: Token ids with one placeholder an image.
        waiting: The images of each placeholder, in order.

    Returns:
        Token ids with every image's placeholders in place, and the images in the order of those: a
        template may put all pictures of a message before its videos.

    Raises:
        RequestError: if there are more or fewer placeholders of a kind than images.
    """
    for placeholder, images in waiting.items():
        found = sum(token == placeholder for token in ids)
        if found != len(images):
            raise RequestError(
                f"the conversation has {found} placeholders {placeholder} for {len(images)} images",
                param="messages",
            )
    queues = {placeholder: iter(images) for placeholder, images in waiting.items()}
    expanded: list[int] = []
    placed: list[ImageInput] = []
    for token in ids:
        if token in queues:
            placed.append(next(queues[token]))
            expanded.extend([token] * placed[-1].num_tokens)
        else:
            expanded.append(token)
    return expanded, tuple(placed)


def mrope_positions(
    ids: Sequence[int],
    grids: Sequence[tuple[int, int, int]],
    placeholder_ids: Sequence[int],
    merge_size: int,
) -> tuple[npt.NDArray[np.int64], int]:
    """Compute the three positions of every token.

    Text counts up on all axes alike. An image that begins at position p has p + its frame, row and
    column (of merged patches); the text after it goes on one above the largest of them. (Here
    transformers 5.24 leaves frames out: a video of more of them than rows and columns overlaps with
    the text behind it. The paper and transformers 4 do as we do.)

    Args:
        ids: T token ids, placeholders expanded.
        grids: Patches along time, height and width of each image, in order.
        placeholder_ids: What stands for pictures and for videos.
        merge_size: Patches along each side of one merged patch.

    Returns:
        Positions `[3, T]` int64, and the position of the next token minus T.

    Raises:
        RequestError: if the placeholders are not those of the grids.

    Source: arXiv 2409.12191, section 2.1; transformers 4 `Qwen2VLModel.get_rope_index`.
    """
    T = len(ids)
    is_image = np.isin(np.asarray(ids, dtype=np.int64), placeholder_ids)  # [T]
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
        position += max(t, rows, columns)
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
