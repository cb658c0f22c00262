"""InternVL2's pictures and prompts, against transformers' processor and the published formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mgvq_runtime.checkpoint.reader import open_checkpoint
from mgvq_runtime.errors import ConfigError, TokenizerError
from mgvq_runtime.models.loading import model_config
from mgvq_runtime.models.registry import FAMILIES
from mgvq_runtime.multimodal.chat import ChatProcessor
from mgvq_runtime.multimodal.processors.base import MAX_RESIZED_SIDE
from mgvq_runtime.multimodal.processors.internvl2 import InternVL2ImageProcessor, select_grid
from tests.runtime.family_folders import (
    INTERNVL_TEMPLATE,
    write_internvl_hf_folder,
    write_internvl_hub_folder,
)
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
PUBLISHED = InternVL2ImageProcessor()
SYSTEM = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, "
    "是一个有用无害的人工智能助手。"
)
PICTURE = "<img><IMG_CONTEXT></img>"


def reference_images(**changes: Any) -> Any:
    from transformers import GotOcr2ImageProcessorPil

    mean, std = list(PUBLISHED.pixels.mean), list(PUBLISHED.pixels.std)
    size = {"height": 448, "width": 448}
    return GotOcr2ImageProcessorPil(
        **{"image_mean": mean, "image_std": std, "size": size, "crop_to_patches": True, **changes}
    )


@pytest.mark.parametrize("limits", [(1, 12), (1, 6), (3, 7), (1, 1), (1, 40)])
def test_grids(limits: tuple[int, int]) -> None:
    """Sizes of every kind, on exact ties too, against transformers' choice."""
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

    ties = [(448 * n, 448 * m) for n in range(1, 9) for m in range(1, 9)]
    for width, height in [*EXTREMES, *ties, *random_sizes(1500, seed=1)]:
        ours = select_grid(height, width, 448, *limits)
        assert ours == get_optimal_tiled_canvas((height, width), (448, 448), *limits)


def test_a_line_is_shortened_before_pillow_makes_its_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table takes 32 bytes a pixel of the longest side: as the picture could, it would grow."""
    sides: list[int] = []
    resize = Image.Image.resize

    def spy(self: Image.Image, *arguments: Any) -> Image.Image:
        sides.append(max(self.size))
        return resize(self, *arguments)

    line = Image.new("RGB", (1_000_000, 1))
    line.paste((255, 255, 255), (500_000, 0, 1_000_000, 1))
    monkeypatch.setattr(Image.Image, "resize", spy)
    tiles = PUBLISHED(line).patches.reshape(13, -1)
    assert len(sides) == 2
    assert MAX_RESIZED_SIDE / 2 < max(sides) <= MAX_RESIZED_SIDE
    assert np.all(tiles[:5] < 0)
    assert np.all(tiles[7:12] > 0)


def test_pixels() -> None:
    """Tiles in transformers' order, the thumbnail last; every float the same."""
    images = reference_images()
    for seed, (width, height) in enumerate(
        [*EXTREMES, *random_sizes(NUM_SIZES, seed=2, longest=1500)]
    ):
        if 3 in (width, height):
            width, height = width + 1, height + 1  # transformers takes 3 rows for 3 channels
        picture = random_picture(width, height, seed)
        ours = PUBLISHED(picture)
        theirs = images([picture], return_tensors="np")
        tiles = int(theirs["num_patches"][0])
        assert (ours.grid_thw, ours.num_tokens) == ((tiles, 32, 32), 256 * tiles), (width, height)
        assert np.array_equal(ours.patches, patches_of(theirs["pixel_values"])), (width, height)
        assert ours.num_tokens <= PUBLISHED.max_num_tokens


def chat_processor(path: Path) -> ChatProcessor:
    checkpoint = open_checkpoint(path)
    return ChatProcessor.from_checkpoint(checkpoint, model_config(checkpoint))


def test_prompts_are_transformers_own(tmp_path: Path) -> None:
    from transformers import GotOcr2ImageProcessorPil, InternVLProcessor

    write_internvl_hf_folder(tmp_path)
    ours = chat_processor(tmp_path)
    images = GotOcr2ImageProcessorPil.from_pretrained(tmp_path)
    theirs = hf_processor(
        InternVLProcessor, tmp_path, images, INTERNVL_TEMPLATE, image_seq_length=4
    )
    num_pictures = [0, 0, 0, 0]
    for seed in range(NUM_CONVERSATIONS):
        messages = random_conversation(seed, most_images=3)
        pictures = random_pictures(messages, seed)
        num_pictures[len(pictures)] += 1
        prompt = ours.prepare(messages, pictures)
        text = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        expected = theirs(text=[text], images=pictures or None)
        assert prompt.token_ids == list(expected["input_ids"][0]), messages
    assert min(num_pictures) > 20


def published_prompt(
    name: str, messages: list[dict[str, Any]], system: str = SYSTEM, bos: str = ""
) -> str:
    """Write a conversation as OpenGVLab does: no line ends behind an end token."""
    before, behind, end = (
        ("<|", "|>\n", "<|end|>") if name == "phi3-chat" else (("<|im_start|>", "\n", "<|im_end|>"))
    )
    text = f"{bos}{before}system{behind}{system}{end}"
    for message in messages:
        text += f"{before}{message['role']}{behind}{message['content']}{end}"
    return f"{text}{before}assistant{behind}"


@pytest.mark.parametrize("name", ["Hermes-2", "internlm2-chat", "phi3-chat"])
def test_published_formats(name: str, tmp_path: Path) -> None:
    write_internvl_hub_folder(tmp_path, template=name)
    processor = chat_processor(tmp_path)
    tokenizer, image = processor.tokenizer, {"type": "image"}
    bos = "<s>" if name == "internlm2-chat" else ""
    one = [{"role": "user", "content": [image, {"type": "text", "text": "What <img>?"}]}]
    several = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [image, image, {"type": "text", "text": "Which?"}]},
        {"role": "assistant", "content": "This."},
        {"role": "user", "content": "Why?"},
    ]
    single = processor.tokenizer.render(one)
    written = [{"role": "user", "content": f"{PICTURE}\nWhat <img>?"}]
    assert single == published_prompt(name, written, bos=bos)
    pictures = f"Image-1: {PICTURE}\nImage-2: {PICTURE}\nWhich?"
    written = [{"role": "user", "content": pictures}, *several[2:]]
    assert processor.tokenizer.render(several) == published_prompt(name, written, "Be brief.", bos)
    prompt = processor.prepare(one, [random_picture(56, 56, 0)])
    context, start = (tokenizer.added_tokens[t] for t in ("<IMG_CONTEXT>", "<img>"))
    assert processor.config.image_token_id == context
    assert prompt.token_ids.count(context) == prompt.images[0].num_tokens == 4
    assert prompt.token_ids.count(start) == 1  # what the user wrote stays text
    end = "<|end|>" if name == "phi3-chat" else "<|im_end|>"
    assert tokenizer.added_tokens[end] in tokenizer.eos_token_ids


def test_settings_of_both_spellings(tmp_path: Path) -> None:
    hub, hf = tmp_path / "hub", tmp_path / "hf"
    write_internvl_hub_folder(hub)
    write_internvl_hf_folder(hf)
    expected = InternVL2ImageProcessor(tile_size=56)
    assert InternVL2ImageProcessor.from_folder(hub) == expected
    assert InternVL2ImageProcessor.from_folder(hf) == expected
    edit(hub, "config.json", dynamic_image_size=False, use_thumbnail=False)
    single = InternVL2ImageProcessor.from_folder(hub)
    assert (single.max_tiles, single.has_thumbnail, single.max_num_tokens) == (1, False, 4)


def test_caps() -> None:
    for cap in (256, 300, 512, 768, 1280, 3328, 10**6):
        capped = PUBLISHED.capped(cap)
        assert capped.max_num_tokens <= cap
        for width, height in random_sizes(6, seed=5, longest=900):
            image = capped(random_picture(width, height, 0))
            assert image.num_tokens <= cap
    most = FAMILIES["InternVLChatModel"].max_image_tokens
    assert most is not None
    assert PUBLISHED.capped(most).max_tiles == 6
    assert PUBLISHED.capped(1280).max_tiles == 4
    assert PUBLISHED.capped(10**6) == PUBLISHED
    assert PUBLISHED.max_grid == (13, 32, 32)
    with pytest.raises(ConfigError, match="at least 256, the tokens of one tile"):
        PUBLISHED.capped(255)


def edit(folder: Path, name: str, **changes: Any) -> Path:
    values = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    (folder / name).write_text(json.dumps({**values, **changes}))
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"force_image_size": 112}, "force_image_size must be 448, the vision tower's"),
        ({"max_dynamic_patch": 10**6}, "max_dynamic_patch must be at most 1000"),
        ({"max_dynamic_patch": 0}, "max_dynamic_patch must be an integer of at least 1"),
        ({"use_thumbnail": "yes"}, "use_thumbnail must be true or false"),
    ],
)
def test_files_that_cannot_be_honoured(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    edit(tmp_path, "config.json", llm_config={"x": 1}, **change)
    with pytest.raises(ConfigError, match=message):
        InternVL2ImageProcessor.from_folder(tmp_path)


def test_an_unknown_conversation_format(tmp_path: Path) -> None:
    write_internvl_hub_folder(tmp_path)
    edit(tmp_path, "config.json", template="internvl_zh")
    with pytest.raises(TokenizerError, match="template must be one of Hermes-2, internlm2-chat"):
        chat_processor(tmp_path)


def test_a_tokenizer_without_the_placeholder(tmp_path: Path) -> None:
    write_internvl_hub_folder(tmp_path)
    definition = json.loads((tmp_path / "tokenizer.json").read_text())
    kept = [t for t in definition["added_tokens"] if t["content"] != "<IMG_CONTEXT>"]
    edit(tmp_path, "tokenizer.json", added_tokens=kept)
    with pytest.raises(TokenizerError, match="placeholder of pictures"):
        chat_processor(tmp_path)
