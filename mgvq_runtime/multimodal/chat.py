"""Messages and pictures to a `Prompt` (called by `engine`, `llm` and the quantizer's calibration).

Rendering and encoding are the tokenizer's; this adds what pictures need: patches, expanded
placeholders, positions. Not here: URLs, decoding, limits on the number of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from mgvq_runtime.errors import RequestError
from mgvq_runtime.models.config import Qwen2VLConfig
from mgvq_runtime.multimodal.processors.qwen2_vl import Qwen2VLImageProcessor
from mgvq_runtime.multimodal.prompt import expand_image_tokens, mrope_positions
from mgvq_runtime.request import Prompt
from mgvq_runtime.tokenizer import Tokenizer

PART_TYPES = ("text", "image")
"""What a part of a message may be here; whoever calls has turned URLs into pictures."""


class ChatProcessor:
    """Turns conversations into prompts of one model."""

    def __init__(
        self, tokenizer: Tokenizer, image_processor: Qwen2VLImageProcessor, config: Qwen2VLConfig
    ) -> None:
        """Put a model's tokenizer, image processor and config together."""
        self.tokenizer, self.image_processor, self.config = tokenizer, image_processor, config

    def prepare(
        self,
        messages: Sequence[Mapping[str, Any]],
        images: Sequence[Image.Image] = (),
        add_generation_prompt: bool = True,
    ) -> Prompt:
        """Turn a conversation into a prompt.

        Args:
            messages: `{"role": ..., "content": text or parts}`; a part is `{"type": "text", "text":
                ...}` or `{"type": "image"}`, which stands for the next of `images`.
            images: Decoded pictures, in the order of their parts.
            add_generation_prompt: Whether the assistant's turn is opened at the end.

        Returns:
            Token ids with placeholders expanded, patches, and positions.

        Raises:
            RequestError: if a message is malformed, or parts and pictures differ in number.
            ImageError: if a picture is narrower than the model takes.
        """
        num_parts = check_messages(messages)
        if num_parts != len(images):
            raise RequestError(
                f"the messages have {num_parts} image parts, {len(images)} images came with them",
                param="messages",
            )
        ids = self.tokenizer.encode_chat(messages, add_generation_prompt)
        inputs = tuple(self.image_processor(image) for image in images)
        image_token_id = self.config.image_token_id
        token_ids = expand_image_tokens(ids, [i.num_tokens for i in inputs], image_token_id)
        grids = [image.grid_thw for image in inputs]
        merge_size = self.config.vision_config.spatial_merge_size
        positions, delta = mrope_positions(token_ids, grids, image_token_id, merge_size)
        return Prompt(token_ids, inputs, positions, delta)


def check_messages(messages: Sequence[Mapping[str, Any]]) -> int:
    """Check the shape of a conversation.

    Returns:
        The number of its image parts.

    Raises:
        RequestError: naming the message and the field that is wrong.
    """
    if not messages:
        raise RequestError("messages must hold at least one message", param="messages")
    num_images = 0
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RequestError(f"{where} must have a role", param=f"{where}.role")
        content = message.get("content")
        if isinstance(content, str):
            continue
        if not isinstance(content, list | tuple):
            raise RequestError(
                f"{where}.content must be a string or a list of parts", param=f"{where}.content"
            )
        for k, part in enumerate(content):
            num_images += _check_part(part, f"{where}.content[{k}]")
    return num_images


def _check_part(part: object, where: str) -> bool:
    """Return whether a part is an image; raise RequestError where it is nothing known."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind not in PART_TYPES:
        raise RequestError(
            f"{where}.type must be {' or '.join(PART_TYPES)}, got {str(kind)[:40]!r}",
            param=f"{where}.type",
        )
    assert isinstance(part, Mapping)
    if kind == "text" and not isinstance(part.get("text"), str):
        raise RequestError(f"{where}.text must be a string", param=f"{where}.text")
    return kind == "image"
