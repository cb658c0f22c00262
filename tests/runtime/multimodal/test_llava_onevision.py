"""LLaVA-OneVision's pictures and prompts, against transformers' processor of the same folder."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mgvq_runtime.checkpoint.reader import open_checkpoint
from mgvq_runtime.errors import ConfigError, TokenizerError
from mgvq_runtime.models.loading import model_config
from mgvq_runtime.models.registry import FAMILIES
from mgvq_runtime.multimodal.chat import ChatProcessor
from mgvq_runtime.multimodal.processors.llava_onevision import (
    MAX_SQUARE_SIDE,
    LlavaOnevisionImageProcessor,
    default_pinpoints,
)
from tests.runtime.family_folders import write_llava_folder, write_lmms_lab_folder
from tests.runtime.multimodal.random_conversations import (
    hf_processor,
    random_conversation,
    random_pictures,
)
from tests.runtime.multimodal.tiled_sizes import (
    EXTREMES,
    patches_of,
    random_picture,
    random_sizes,
)

NUM_SIZES, NUM_CONVERSATIONS = 200, 500
PUBLISHED = LlavaOnevisionImageProcessor(default_pinpoints(384))


def reference_images(**changes: Any) -> Any:
    from transformers import LlavaOnevisionImageProcessorPil

    return LlavaOnevisionImageProcessorPil(
        **{"image_mean": [0.5] * 3, "image_std": [0.5] * 3, **changes}
    )


def reference_tokens(images: Any, height: int, width: int, side: int = 27) -> int:
    """What transformers' processor counts for one picture, without a tokenizer around it."""
    from transformers import LlavaOnevisionProcessor as Reference

    processor = SimpleNamespace(
        image_processor=images, num_image_tokens=side**2, vision_aspect_ratio="anyres_max_9"
    )
    processor._get_unpadded_features = Reference._get_unpadded_features.__get__(processor)
    tile = images.size["height"]
    return Reference._get_number_of_features(processor, height, width, tile, tile)


def test_token_counts() -> None:
    """Sizes of every kind, against transformers' count: the unpadding is never off by one."""
    images = reference_images()
    for width, height in [*EXTREMES, *random_sizes(3000, seed=1)]:
        layout = PUBLISHED.layout_of(height, width)
        assert layout is not None
        rows, columns = layout.shrunk
        count = 729 + rows * (columns + 1)
        assert count == reference_tokens(images, height, width), (width, height)
        assert count <= PUBLISHED.max_num_tokens


def test_pixels_of_single_pictures() -> None:
    """Tiles in transformers' order, the whole first; every float the same."""
    images = reference_images()
    for seed, (width, height) in enumerate(
        [*EXTREMES, *random_sizes(NUM_SIZES, seed=2, longest=1500)]
    ):
        picture = random_picture(width, height, seed)
        ours = PUBLISHED(picture)
        theirs = images([picture], return_tensors="np")["pixel_values"][0]
        assert ours.grid_thw == (len(theirs), 27, 27), (width, height)
        assert np.array_equal(ours.patches, patches_of(theirs)), (width, height)
        assert ours.num_tokens == reference_tokens(images, height, width)


def test_pixels_of_several_pictures() -> None:
    """More than one in a conversation: padded to a square, one tile each."""
    images = reference_images()
    for seed, (width, height) in enumerate(random_sizes(30, seed=3, longest=1500)):
        pictures = [random_picture(width, height, seed), random_picture(30, 41, seed)]
        theirs = images([pictures], return_tensors="np")["pixel_values"]
        for picture, tiles in zip(pictures, theirs, strict=True):
            ours = PUBLISHED(picture, is_alone=False)
            assert (ours.grid_thw, ours.num_tokens, ours.layout) == ((1, 27, 27), 730, None)
            assert np.array_equal(ours.patches, patches_of(tiles)), (width, height)


@pytest.mark.parametrize("size", [(1_000_000, 1), (1, 1_000_000)])
def test_a_line_does_not_take_the_memory_of_its_square(size: tuple[int, int]) -> None:
    """A kilobyte of PNG; its square would have a million million pixels, 4 TB."""
    made: list[tuple[int, int]] = []
    new = Image.new

    def spy(mode: str, size: tuple[int, int], colour: Any) -> Image.Image:
        made.append(size)
        return new(mode, size, colour)

    line = new("RGB", size, (255, 255, 255))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image, "new", spy)
        ours = PUBLISHED(line, is_alone=False)
    assert made
    assert max(max(size) for size in made) <= MAX_SQUARE_SIDE
    assert (ours.grid_thw, ours.num_tokens) == ((1, 27, 27), 730)


def test_a_square_is_shrunk_before_only_where_it_is_too_large() -> None:
    """Before or after makes little difference to the tile."""
    picture = random_picture(500, 60, 0)
    exact = PUBLISHED(picture, is_alone=False).patches
    with pytest.MonkeyPatch.context() as patch:
        path = "mgvq_runtime.multimodal.processors.llava_onevision.MAX_SQUARE_SIDE"
        patch.setattr(path, 500)
        assert np.array_equal(PUBLISHED(picture, is_alone=False).patches, exact)
        patch.setattr(path, 499)
        assert 0 < np.abs(PUBLISHED(picture, is_alone=False).patches - exact).mean() < 0.05


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llava")
    write_llava_folder(path)
    return path


def chat_processor(path: Path, max_image_tokens: int | None = None) -> ChatProcessor:
    checkpoint = open_checkpoint(path)
    return ChatProcessor.from_checkpoint(checkpoint, model_config(checkpoint), max_image_tokens)


def test_prompts_are_transformers_own(folder: Path) -> None:
    from transformers import LlavaOnevisionImageProcessorPil, LlavaOnevisionProcessor

    ours = chat_processor(folder)
    images = LlavaOnevisionImageProcessorPil.from_pretrained(folder)
    template = json.loads((folder / "chat_template.json").read_text())["chat_template"]
    theirs = hf_processor(
        LlavaOnevisionProcessor,
        folder,
        images,
        template,
        num_image_tokens=16,
        vision_feature_select_strategy="full",
    )
    num_pictures = [0, 0, 0, 0]
    for seed in range(NUM_CONVERSATIONS):
        messages = random_conversation(seed, most_images=3)
        pictures = random_pictures(messages, seed)
        num_pictures[len(pictures)] += 1
        prompt = ours.prepare(messages, pictures)
        text = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        expected = theirs(text=[text], images=[pictures] if pictures else None)
        assert prompt.token_ids == list(expected["input_ids"][0]), messages
        assert np.array_equal(prompt.positions, np.tile(np.arange(len(prompt.token_ids)), (3, 1)))
    assert min(num_pictures) > 20


def test_strings_are_read_as_parts(folder: Path) -> None:
    """The template looks for parts; a plain text would be left out without a word."""
    processor = chat_processor(folder)
    plain = [{"role": "user", "content": "What is it?"}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "What is it?"}]}]
    assert processor.prepare(plain).token_ids == processor.prepare(parts).token_ids
    assert "What is it?" in processor.tokenizer.decode(processor.prepare(plain).token_ids)


def test_lmms_lab_folder(tmp_path: Path) -> None:
    """Conversation format, placeholder, pinpoints and sizes that only lmms-lab's code knows."""
    write_lmms_lab_folder(tmp_path)
    processor = chat_processor(tmp_path)
    images = processor.image_processor
    assert isinstance(images, LlavaOnevisionImageProcessor)
    assert images == LlavaOnevisionImageProcessor(default_pinpoints(60), tile_size=60)
    image, tokenizer = {"type": "image"}, processor.tokenizer
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [image, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "<image>"},
        {"role": "user", "content": "And now?"},
    ]
    (picture,) = random_pictures(messages, 0)
    prompt = processor.prepare(messages, [picture])
    expected = tokenizer.encode(
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<image>\nWhat?<|im_end|>\n<|im_start|>assistant\n",
        allow_special=True,
    )
    assert tokenizer.added_tokens["<image>"] == processor.config.image_token_id
    place = expected.index(tokenizer.added_tokens["<image>"])
    expected[place : place + 1] = [expected[place]] * prompt.images[0].num_tokens
    assert prompt.token_ids[: len(expected)] == expected
    assert tokenizer.added_tokens["<image>"] not in prompt.token_ids[len(expected) :]
    assert tokenizer.special_id("<|im_end|>") in tokenizer.eos_token_ids


def test_caps(folder: Path) -> None:
    """Canvases that could take more are left out; below one tile there is nothing to leave out."""
    for cap in (1484, 1485, 2268, 5000):
        capped = PUBLISHED.capped(cap)
        assert capped.max_num_tokens <= cap
        counts = [
            capped(random_picture(width, height, 0)).num_tokens
            for width, height in random_sizes(40, seed=5, longest=900)
        ]
        assert max(counts) <= cap
    most = FAMILIES["LlavaOnevisionForConditionalGeneration"].max_image_tokens
    assert most is not None
    small = [p for p in PUBLISHED.pinpoints if p[0] * p[1] <= 4 * 384**2]
    assert PUBLISHED.capped(most).pinpoints == tuple(small)
    assert PUBLISHED.capped(1484).pinpoints == ()
    assert PUBLISHED.capped(1485).pinpoints == ((384, 384),)
    assert PUBLISHED.max_grid == (37, 27, 27)
    with pytest.raises(ConfigError, match="at least 730, the tokens of one tile"):
        PUBLISHED.capped(729)
    assert (
        chat_processor(folder, 17)
        .prepare([{"role": "user", "content": [{"type": "image"}]}], [random_picture(90, 40, 0)])
        .token_ids.count(model_config(open_checkpoint(folder)).image_token_id)
        == 17
    )


def edit(folder: Path, name: str, **changes: Any) -> Path:
    values = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    (folder / name).write_text(json.dumps({**values, **changes}))
    return folder


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("config.json", {"vision_aspect_ratio": "square"}, "must be 'anyres' or 'anyres_max_9'"),
        ("config.json", {"vision_config": {"image_size": 384}}, "size.height must be 384, the"),
        ("preprocessor_config.json", {"image_grid_pinpoints": [[60, 61]]}, "in multiples of 60"),
        ("preprocessor_config.json", {"image_grid_pinpoints": "(1x1)"}, "a list of sizes"),
        ("preprocessor_config.json", {"do_pad": False}, "do_pad must be true"),
        ("preprocessor_config.json", {"size": {"shortest_edge": 9}}, "shortest_edge must be 60"),
    ],
)
def test_files_that_cannot_be_honoured(
    tmp_path: Path, name: str, change: dict[str, Any], message: str
) -> None:
    edit(tmp_path, "config.json", vision_config={"image_size": 60})
    edit(tmp_path, "preprocessor_config.json", size={"height": 60, "width": 60})
    with pytest.raises(ConfigError, match=message):
        LlavaOnevisionImageProcessor.from_folder(edit(tmp_path, name, **change))


def test_aspect_without_a_maximum(tmp_path: Path) -> None:
    edit(tmp_path, "config.json", image_aspect_ratio="anyres", image_grid_pinpoints=[[384, 768]])
    processor = LlavaOnevisionImageProcessor.from_folder(tmp_path)
    assert processor == LlavaOnevisionImageProcessor(((384, 768),), max_tiles=None)


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    write_llava_folder(tmp_path)
    edit(tmp_path, "config.json", image_token_index=3)
    with pytest.raises(TokenizerError, match=r"placeholder of pictures \(image_token_id 3\)"):
        chat_processor(tmp_path)
