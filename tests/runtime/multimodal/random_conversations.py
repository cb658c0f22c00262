"""Random conversations with pictures and videos; transformers' processors to render them with."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from PIL import Image

from tests.runtime.multimodal.tiled_sizes import random_picture

WORDS = ["red", " circles", "\n", "  ", "picture?", "é", "画像", "'s", "7", "\t", "What", "! ", "<"]
IMAGE: dict[str, Any] = {"type": "image"}
VIDEO: dict[str, Any] = {"type": "video"}


def random_conversation(seed: int, most_images: int, most_videos: int = 0) -> list[dict[str, Any]]:
    """Return up to three turns, and a system message now and then; content in parts."""
    rng = random.Random(seed)

    def text() -> dict[str, Any]:
        return {"type": "text", "text": "".join(rng.choices(WORDS, k=rng.randint(1, 7)))}

    messages: list[dict[str, Any]] = []
    if rng.random() < 0.3:
        messages.append({"role": "system", "content": [text()]})
    left = most_images
    for turn in range(rng.randint(1, 3)):
        if turn:
            messages.append({"role": "assistant", "content": [text()]})
        content = []
        for _ in range(rng.randint(1, 4)):
            is_image = left > 0 and rng.random() < 0.35
            left -= is_image
            is_video = most_videos > 0 and not is_image and rng.random() < 0.35
            most_videos -= is_video
            content.append(IMAGE if is_image else VIDEO if is_video else text())
        messages.append({"role": "user", "content": content})
    return messages


def random_pictures(messages: list[dict[str, Any]], seed: int) -> list[Image.Image]:
    """Return a picture for every image part."""
    rng = random.Random(seed)
    count = sum(part == IMAGE for message in messages for part in message["content"])
    return [
        random_picture(rng.randint(1, 200), rng.randint(1, 200), seed + i) for i in range(count)
    ]


def hf_processor(
    base: type, folder: Path, images: Any, template: str, videos: Any = None, **settings: Any
) -> Any:
    """Return a processor of transformers, with another video part: its own needs torchvision."""
    from transformers import AutoTokenizer

    class WithoutTorchvision(base):  # type: ignore[misc,valid-type]
        def check_argument_for_proper_class(self, *_: Any) -> None:
            pass

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return WithoutTorchvision(
        image_processor=images,
        tokenizer=tokenizer,
        video_processor=videos,
        chat_template=template,
        **settings,
    )
