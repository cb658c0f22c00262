"""Messages and pictures to a `Prompt` (called by `engine`, `llm` and the quantizer's calibration).

Rendering and encoding are the tokenizer's; this adds what pictures and videos need: patches,
expanded placeholders, positions. Not here: URLs, decoding, limits on the number of tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from mgvq_runtime.cache.lru import LRUCache
from mgvq_runtime.checkpoint.reader import Checkpoint
from mgvq_runtime.errors import ImageError, RequestError, TokenizerError
from mgvq_runtime.models.config import ModelConfig
from mgvq_runtime.models.registry import find_family
from mgvq_runtime.multimodal.image import EncodedImage, Picture, Visual
from mgvq_runtime.multimodal.processors import ImageProcessor
from mgvq_runtime.multimodal.prompt import build_prompt
from mgvq_runtime.request import ImageInput, Prompt
from mgvq_runtime.tokenizer import Tokenizer

PART_TYPES = ("text", "image", "video")
"""What a part of a message may be here; whoever calls has turned URLs into pictures."""

PreparedKey = tuple[tuple[bytes, ...], bool | None]
"""Digests of a picture or of a video's frames, and whether a picture is alone; None for a video."""


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

        Encoded pictures and videos that come again are not decoded and cut again as long as their
        patches are among the last `image_cache_bytes`.
        """
        self.tokenizer, self.image_processor, self.config = tokenizer, image_processor, config
        self._prepared = LRUCache[PreparedKey, tuple[ImageInput, ...]](image_cache_bytes)

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
            max_image_tokens: Most tokens one picture may take; None takes the family's default.
            image_cache_bytes: Patches kept for pictures that come again.

        Raises:
            TokenizerError: if there is no tokenizer that can be used, or none for pictures.
            ConfigError: if how pictures are prepared is missing or cannot be honoured.
        """
        family = find_family(checkpoint.config)
        if family.image_processor is None:
            return cls(Tokenizer.from_folder(checkpoint.path, default_template=None), None, config)
        tokenizer = Tokenizer.from_folder(checkpoint.path)
        if config.image_token_id not in tokenizer.added_tokens.values():
            raise TokenizerError(
                f"{checkpoint.path}: the placeholder of pictures (image_token_id "
                f"{config.image_token_id}) is not among the tokenizer's special tokens: "
                "tokenizer.json or added_tokens.json is of another model"
            )
        if config.video_token_id not in tokenizer.added_tokens.values():
            config = dataclasses.replace(config, video_token_id=None)
        most = family.max_image_tokens if max_image_tokens is None else max_image_tokens
        processor = family.image_processor.from_folder(checkpoint.path, most)
        return cls(tokenizer, processor, config, image_cache_bytes)

    def prepare(
        self,
        messages: Sequence[Mapping[str, Any]],
        visuals: Sequence[Visual] = (),
        add_generation_prompt: bool = True,
    ) -> Prompt:
        """Turn a conversation into a prompt.

        Args:
            messages: `{"role": ..., "content": text or parts}`; a part is `{"type": "text", "text":
                ...}`, or `{"type": "image"}` or `{"type": "video"}` for the next of `visuals`.
            visuals: Pictures, decoded or not, and videos as their frames, in the order of their
                parts.
            add_generation_prompt: Whether the assistant's turn is opened at the end.

        Returns:
            Token ids with placeholders expanded, patches, and positions.

        Raises:
            RequestError: if a message is malformed, parts and pictures differ, or the model takes
                no pictures or no videos.
            ImageError: if a picture is damaged, or of a shape the model does not take.
        """
        parts = check_messages(messages)
        given = ["image" if isinstance(visual, Picture) else "video" for visual in visuals]
        for kind in ("image", "video"):
            if parts.count(kind) != given.count(kind):
                raise RequestError(
                    f"the messages have {parts.count(kind)} {kind} parts, {given.count(kind)} "
                    f"{kind}s came with them",
                    param="messages",
                )
        if parts != given:
            raise RequestError(
                "images and videos are not in the order of their parts", param="messages"
            )
        inputs = self.process(visuals)
        if self.image_processor is None:
            messages = [_as_text(message) for message in messages]
        elif self.config.shows_frames:
            messages = _as_frames(messages, visuals)
        ids = self.tokenizer.encode_chat(messages, add_generation_prompt)
        return build_prompt(ids, inputs, self.config)

    def process(self, visuals: Sequence[Visual]) -> tuple[ImageInput, ...]:
        """Prepare all pictures and videos of a conversation; several threads may do so at once.

        Raises:
            RequestError: if the model takes no pictures or no videos.
            ImageError: if a picture is damaged, or of a shape the model does not take; `.param` is
                the encoded picture's own, for a video that of its first frame.
        """
        if not visuals:
            return ()
        if self.image_processor is None:
            raise RequestError("this model reads text alone; leave pictures out", param="messages")
        videos = [visual for visual in visuals if not isinstance(visual, Picture)]
        if not all(videos):
            raise RequestError("a video must have at least one frame", param="messages")
        if videos and not self.config.shows_frames and self.config.video_token_id is None:
            raise RequestError(
                "this model takes no videos: send some frames as images", param="messages"
            )
        is_alone = len(visuals) - len(videos) == 1
        inputs = [self._prepare(self.image_processor, visual, is_alone) for visual in visuals]
        return tuple(image for images in inputs for image in images)

    def _prepare(
        self, processor: ImageProcessor, visual: Visual, is_alone: bool
    ) -> tuple[ImageInput, ...]:
        """Prepare one picture or video; what came before is known by its bytes."""
        frames = [visual] if isinstance(visual, Picture) else list(visual)
        encoded = [frame for frame in frames if isinstance(frame, EncodedImage)]
        if len(encoded) < len(frames):
            return _cut(processor, visual, is_alone)
        digests = tuple(frame.digest for frame in encoded)
        key = (digests, is_alone if isinstance(visual, Picture) else None)
        inputs = self._prepared.get(key)
        if inputs is None:
            try:
                inputs = _cut(processor, visual, is_alone)
            except ImageError as error:  # a processor sees pixels, and not where they came from
                raise ImageError(str(error), error.param or encoded[0].param) from None
            # Reading the digest makes it: here, and not in the one thread everybody waits for.
            num_bytes = sum(image.patches.nbytes + len(image.digest) for image in inputs)
            self._prepared.put(key, inputs, num_bytes)
        return inputs


def _cut(processor: ImageProcessor, visual: Visual, is_alone: bool) -> tuple[ImageInput, ...]:
    """Decode one picture, or the frames of a video, and make patches."""
    if isinstance(visual, Picture):
        return (processor(_decoded(visual), is_alone),)
    return processor.video([_decoded(frame) for frame in visual])


def _decoded(picture: Picture) -> Image.Image:
    return picture if isinstance(picture, Image.Image) else picture.decode()


def _as_frames(
    messages: Sequence[Mapping[str, Any]], visuals: Sequence[Visual]
) -> list[Mapping[str, Any]]:
    """Write each video as pictures in numbered lines, one a frame.

    Source: the model card of OpenGVLab/InternVL2-2B, "video multi-round conversation".
    """
    videos = iter([visual for visual in visuals if not isinstance(visual, Picture)])

    def shown(part: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        if part["type"] != "video":
            return [part]
        lines: list[Mapping[str, Any]] = []
        for number in range(1, len(next(videos)) + 1):
            lines.append({"type": "text", "text": f"Frame{number}: "})
            lines.append({"type": "image", "is_frame": True})
        return lines

    return [
        message
        if isinstance(message["content"], str)
        else {**message, "content": [line for part in message["content"] for line in shown(part)]}
        for message in messages
    ]


def _as_text(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """Join the text parts of a message: the templates of text-only models know no parts."""
    content = message["content"]
    if isinstance(content, str):
        return message
    return {**message, "content": "\n".join(part["text"] for part in content)}


def check_messages(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    """Check the shape of a conversation.

    Returns:
        The types of its image and video parts, in order.

    Raises:
        RequestError: naming the message and the field that is wrong.
    """
    if not messages:
        raise RequestError("messages must hold at least one message", param="messages")
    types = []
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
            types.append(_check_part(part, f"{where}.content[{k}]"))
    return [kind for kind in types if kind != "text"]


def _check_part(part: object, where: str) -> str:
    """Return the type of a part; raise RequestError where it is nothing known."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind not in PART_TYPES:
        raise RequestError(
            f"{where}.type must be text, image or video, got {str(kind)[:40]!r}",
            param=f"{where}.type",
        )
    assert isinstance(part, Mapping)
    if kind == "text" and not isinstance(part.get("text"), str):
        raise RequestError(f"{where}.text must be a string", param=f"{where}.text")
    return str(kind)
