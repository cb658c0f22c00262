"""Messages and pictures to a `Prompt` (called by `engine`, `llm` and the quantizer's calibration).

Rendering and encoding are the tokenizer's; this adds what pictures need: patches, expanded
placeholders, positions. Not here: URLs, decoding, limits on the number of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from mgvq_runtime.cache.lru import LRUCache
from mgvq_runtime.checkpoint.reader import Checkpoint
from mgvq_runtime.errors import RequestError, TokenizerError
from mgvq_runtime.models.config import ModelConfig
from mgvq_runtime.models.registry import find_family
from mgvq_runtime.multimodal.image import Picture
from mgvq_runtime.multimodal.processors import ImageProcessor
from mgvq_runtime.multimodal.prompt import build_prompt
from mgvq_runtime.request import ImageInput, Prompt
from mgvq_runtime.tokenizer import Tokenizer

PART_TYPES = ("text", "image")
"""What a part of a message may be here; whoever calls has turned URLs into pictures."""


class ChatProcessor:
    """Turns conversations into prompts of one model."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        image_processor: ImageProcessor | None,
        config: ModelConfig,
        image_cache_bytes: int = 0,
    ) -> None:
        """Put a model's tokenizer, image processor (None for text alone) and config together.

        Encoded pictures that come again are not decoded and cut again as long as their patches are
        among the last `image_cache_bytes`.
        """
        self.tokenizer, self.image_processor, self.config = tokenizer, image_processor, config
        self._prepared = LRUCache[tuple[bytes, bool], ImageInput](image_cache_bytes)

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        config: ModelConfig,
        max_image_tokens: int | None = None,
        image_cache_bytes: int = 0,
    ) -> ChatProcessor:
        """Read tokenizer, template and image processor from a checkpoint's folder.

        Args:
            checkpoint: An opened folder.
            config: Of its model.
            max_image_tokens: Most tokens one picture may take; None leaves it to the checkpoint.
            image_cache_bytes: Patches kept for pictures that come again.

        Raises:
            TokenizerError: if there is no tokenizer that can be used, or none for pictures.
            ConfigError: if how pictures are prepared is missing or cannot be honoured.
        """
        images = find_family(checkpoint.config).image_processor
        if images is None:
            return cls(Tokenizer.from_folder(checkpoint.path, default_template=None), None, config)
        tokenizer = Tokenizer.from_folder(checkpoint.path)
        if config.image_token_id not in tokenizer.added_tokens.values():
            raise TokenizerError(
                f"{checkpoint.path}: the placeholder of pictures (image_token_id "
                f"{config.image_token_id}) is not among the tokenizer's special tokens: "
                "tokenizer.json or added_tokens.json is of another model"
            )
        processor = images.from_folder(checkpoint.path, max_image_tokens)
        return cls(tokenizer, processor, config, image_cache_bytes)

    def prepare(
        self,
        messages: Sequence[Mapping[str, Any]],
        images: Sequence[Picture] = (),
        add_generation_prompt: bool = True,
    ) -> Prompt:
        """Turn a conversation into a prompt.

        Args:
            messages: `{"role": ..., "content": text or parts}`; a part is `{"type": "text", "text":
                ...}` or `{"type": "image"}`, which stands for the next of `images`.
            images: Pictures, decoded or not, in the order of their parts.
            add_generation_prompt: Whether the assistant's turn is opened at the end.

        Returns:
            Token ids with placeholders expanded, patches, and positions.

        Raises:
            RequestError: if a message is malformed, parts and pictures differ in number, or the
                model takes no pictures.
            ImageError: if a picture is damaged, or narrower than the model takes.
        """
        num_parts = check_messages(messages)
        if num_parts != len(images):
            raise RequestError(
                f"the messages have {num_parts} image parts, {len(images)} images came with them",
                param="messages",
            )
        inputs = self.process(images)
        if self.image_processor is None:
            messages = [_as_text(message) for message in messages]
        ids = self.tokenizer.encode_chat(messages, add_generation_prompt)
        return build_prompt(ids, inputs, self.config)

    def process(self, images: Sequence[Picture]) -> tuple[ImageInput, ...]:
        """Prepare all pictures of one conversation; several threads may do so at once.

        Raises:
            RequestError: if the model takes no pictures.
            ImageError: if a picture is damaged, or narrower than the model takes.
        """
        if not images:
            return ()
        if self.image_processor is None:
            raise RequestError("this model reads text alone; leave pictures out", param="messages")
        is_alone = len(images) == 1
        return tuple(self._prepare_image(self.image_processor, image, is_alone) for image in images)

    def _prepare_image(
        self, processor: ImageProcessor, image: Picture, is_alone: bool
    ) -> ImageInput:
        if isinstance(image, Image.Image):
            return processor(image, is_alone)
        key = (image.digest, is_alone)
        prepared = self._prepared.get(key)
        if prepared is None:
            prepared = processor(image.decode(), is_alone)
            # Reading the digest makes it: here, and not in the one thread everybody waits for.
            num_bytes = prepared.patches.nbytes + len(prepared.digest)
            self._prepared.put(key, prepared, num_bytes)
        return prepared


def _as_text(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """Join the text parts of a message: the templates of text-only models know no parts."""
    content = message["content"]
    if isinstance(content, str):
        return message
    return {**message, "content": "\n".join(part["text"] for part in content)}


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
