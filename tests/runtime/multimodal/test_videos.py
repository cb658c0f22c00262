"""Videos as lists of frames: patches, placeholders and lines, against transformers' processors."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mgvq_runtime.checkpoint.reader import open_checkpoint
from mgvq_runtime.errors import ImageError, RequestError
from mgvq_runtime.models.loading import model_config
from mgvq_runtime.multimodal.chat import ChatProcessor
from mgvq_runtime.multimodal.image import Visual
from mgvq_runtime.multimodal.processors.internvl2 import InternVL2ImageProcessor
from mgvq_runtime.multimodal.processors.llava_onevision import LlavaOnevisionImageProcessor
from mgvq_runtime.multimodal.processors.qwen2_vl import Qwen2VLImageProcessor
from mgvq_runtime.request import TileLayout
from tests.runtime.conftest import CHAT_TEMPLATE, write_json
from tests.runtime.family_folders import (
    INTERNVL_TEMPLATE,
    LLAVA_TEMPLATE,
    write_internvl_hf_folder,
    write_internvl_hub_folder,
    write_llava_folder,
    write_lmms_lab_folder,
)
from tests.runtime.multimodal.random_conversations import hf_processor, random_conversation
from tests.runtime.multimodal.tiled_sizes import patches_of, random_picture, random_sizes
from tests.runtime.multimodal.video_reference import (
    internvl_video,
    llava_video,
    qwen2_vl_video,
    random_frames,
)

NUM_CONVERSATIONS = 60
VIDEO: dict[str, Any] = {"type": "video"}


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


def chat_processor(path: Path) -> ChatProcessor:
    checkpoint = open_checkpoint(path)
    return ChatProcessor.from_checkpoint(checkpoint, model_config(checkpoint))


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_qwen2_vl_patches(count: int) -> None:
    processor = Qwen2VLImageProcessor(max_pixels=10**7, frame_min_pixels=784 * 4)
    for seed, (width, height) in enumerate([(30, 90), (150, 100), (97, 201), (56, 56)]):
        frames = random_frames(count, width, height, seed)
        (video,) = processor.video(frames)
        patches, grid = qwen2_vl_video(processor, frames)
        assert list(video.grid_thw) == grid
        assert video.num_tokens == np.prod(grid) // 4
        assert video.is_video
        assert np.abs(video.patches - patches.numpy()).max() < 1e-6


def test_a_picture_is_a_video_of_one_frame() -> None:
    processor = Qwen2VLImageProcessor()
    picture = random_picture(90, 120, 0)
    as_picture, (as_video,) = processor(picture), processor.video([picture])
    assert np.array_equal(as_picture.patches, as_video.patches)
    assert as_picture.grid_thw == as_video.grid_thw


def test_a_video_costs_no_more_than_the_largest_picture() -> None:
    """Unless its frames would fall below their least size."""
    processor = Qwen2VLImageProcessor(max_pixels=10**7).capped(60)
    for count, most in ((1, 60), (2, 60), (9, 12), (20, 6)):
        frames = random_frames(count, 300, 200)
        (video,) = processor.video(frames)
        t = -(-count // 2)
        assert video.num_tokens <= t * most <= 60
        patches, grid = qwen2_vl_video(processor, frames, 60 * 784 // t)
        assert list(video.grid_thw) == grid
        assert np.abs(video.patches - patches.numpy()).max() < 1e-6
    frames = random_frames(90, 300, 200)
    (video,) = processor.video(frames)
    assert video.num_tokens > 60
    assert list(video.grid_thw) == qwen2_vl_video(processor, frames, int(1.05 * 3136))[1]


def test_frames_of_qwen2_vl_have_one_size() -> None:
    frames = [*random_frames(2, 50, 60), random_picture(60, 50, 0)]
    with pytest.raises(ImageError, match="must be of one size, got 50 x 60, 60 x 50"):
        Qwen2VLImageProcessor().video(frames)


def test_tiles_of_frames() -> None:
    """Stretched to one tile, whatever the shape."""
    llava = LlavaOnevisionImageProcessor(((120, 120), (60, 120)), tile_size=60)
    internvl = InternVL2ImageProcessor(tile_size=56)
    for seed, (width, height) in enumerate(random_sizes(12, seed=4, longest=300)):
        frames = random_frames(3, width + 4, height + 4, seed)
        (video,) = llava.video(frames)
        assert (video.grid_thw, video.num_tokens, video.is_video) == ((3, 4, 4), 3 * 4 + 1, True)
        assert np.array_equal(video.patches, patches_of(llava_video(llava, frames)[0].numpy()))
        tiles = internvl.video(frames)
        assert [(t.grid_thw, t.num_tokens, t.is_video) for t in tiles] == [
            ((1, 4, 4), 4, False)
        ] * 3
        found = np.concatenate([tile.patches for tile in tiles])
        assert np.array_equal(found, patches_of(internvl_video(internvl, frames).numpy()))


def test_the_video_processors_own_file(tmp_path: Path) -> None:
    """Beside the pictures' or inside processor_config.json; the pictures' where there is none."""
    images = {"min_pixels": 3136, "max_pixels": 784 * 99}
    video = {"size": {"shortest_edge": 784, "longest_edge": 784 * 7}, "image_mean": [0.1, 0.2, 0.3]}
    write_json(tmp_path / "preprocessor_config.json", images)
    plain = Qwen2VLImageProcessor.from_folder(tmp_path)
    assert (plain.frame_min_pixels, plain.frame_max_pixels) == (3136, 784 * 99)
    assert plain.video_pixels == plain.pixels
    write_json(tmp_path / "video_preprocessor_config.json", video)
    beside = Qwen2VLImageProcessor.from_folder(tmp_path)
    assert (beside.frame_min_pixels, beside.frame_max_pixels) == (784, 784 * 7)
    assert beside.video_pixels.mean == (0.1, 0.2, 0.3)
    assert beside.pixels == plain.pixels
    nested = tmp_path / "nested"
    nested.mkdir()
    both = {"image_processor": images, "video_processor": video}
    write_json(nested / "processor_config.json", both)
    assert Qwen2VLImageProcessor.from_folder(nested) == beside


class FakeVideos:
    """As much of transformers' video processors as decides on the number of placeholders."""

    merge_size = 2

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __call__(self, videos: Any, **_: Any) -> dict[str, Any]:
        if self.kind == "qwen2-vl":
            grids = [qwen2_vl_video(Qwen2VLImageProcessor(), frames)[1] for frames in videos]
            return {"pixel_values_videos": None, "video_grid_thw": torch.tensor(grids)}
        pixels = [torch.zeros(len(frames), 3, 2, 2) for frames in videos]
        return {"pixel_values_videos": pixels if self.kind == "llava" else torch.stack(pixels)}


def reference(kind: str, folder: Path) -> Any:
    """transformers' processor of a folder, pictures left out."""
    import transformers

    base, template, settings = {
        "qwen2-vl": ("Qwen2VLProcessor", CHAT_TEMPLATE, {}),
        "llava": (
            "LlavaOnevisionProcessor",
            LLAVA_TEMPLATE,
            {"num_image_tokens": 16, "vision_feature_select_strategy": "full"},
        ),
        "internvl": ("InternVLProcessor", INTERNVL_TEMPLATE, {"image_seq_length": 4}),
    }[kind]
    images = SimpleNamespace(merge_size=2, model_input_names=[])
    return hf_processor(
        getattr(transformers, base), folder, images, template, FakeVideos(kind), **settings
    )


@pytest.mark.parametrize("kind", ["qwen2-vl", "llava", "internvl"])
def test_prompts_are_transformers_own(
    kind: str, tmp_path: Path, tiny_qwen2_vl_folder: Path
) -> None:
    folder = tiny_qwen2_vl_folder if kind == "qwen2-vl" else tmp_path
    if kind != "qwen2-vl":
        {"llava": write_llava_folder, "internvl": write_internvl_hf_folder}[kind](folder)
    ours, theirs = chat_processor(folder), reference(kind, folder)
    num_videos = [0, 0, 0]
    for seed in range(NUM_CONVERSATIONS):
        messages = random_conversation(seed, most_images=0, most_videos=2)
        count = sum(part == VIDEO for message in messages for part in message["content"])
        num_videos[count] += 1
        # transformers stacks the videos of InternVL, so they are equally long.
        lengths = [1 + seed % 4, 1 + (seed % 4 if kind == "internvl" else (seed + 2) % 4)][:count]
        videos: list[Visual] = [random_frames(length, 70, 50) for length in lengths]
        prompt = ours.prepare(messages, videos)
        rendered = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        expected = theirs(text=[rendered], videos=videos or None)
        assert prompt.token_ids == list(expected["input_ids"][0]), messages
    assert min(num_videos) > 5


def test_pictures_go_before_videos_where_the_template_says_so(tmp_path: Path) -> None:
    write_llava_folder(tmp_path)
    processor = chat_processor(tmp_path)
    messages = [{"role": "user", "content": [VIDEO, text("or"), {"type": "image"}]}]
    prompt = processor.prepare(messages, [random_frames(2, 60, 60), random_picture(60, 60, 0)])
    assert [image.is_video for image in prompt.images] == [False, True]
    assert isinstance(prompt.images[0].layout, TileLayout), "the only picture is cut into tiles"
    config = processor.config
    order = [token for token in prompt.token_ids if token in config.placeholder_ids]
    picture, video = prompt.images
    assert order == [config.image_token_id] * picture.num_tokens + (
        [config.video_token_id] * video.num_tokens
    )


@pytest.mark.parametrize("template", ["Hermes-2", "internlm2-chat", "phi3-chat"])
def test_lines_of_frames_in_the_hubs_formats(template: str, tmp_path: Path) -> None:
    """As the model card writes them; pictures are numbered apart."""
    write_internvl_hub_folder(tmp_path, template=template)
    processor = chat_processor(tmp_path)
    picture = "<img>" + "<IMG_CONTEXT>" * 4 + "</img>\n"

    def prompt(content: list[dict[str, Any]], visuals: list[Visual]) -> str:
        ids = processor.prepare([{"role": "user", "content": content}], visuals).token_ids
        return processor.tokenizer.decode(ids, skip_special_tokens=False)

    one = random_picture(50, 50, 0)
    shown = prompt([VIDEO, text("What?")], [random_frames(3, 70, 50)])
    frames = "".join(f"Frame{i}: {picture}" for i in (1, 2, 3))
    assert f"user{'|>' if template == 'phi3-chat' else ''}\n{frames}What?<" in shown
    assert "Image-" not in shown
    image = {"type": "image"}
    shown = prompt([image, VIDEO, image], [one, random_frames(1, 70, 50), one])
    assert f"Image-1: {picture}Frame1: {picture}Image-2: {picture}" in shown


def test_lmms_lab(tmp_path: Path) -> None:
    """Videos stand behind the placeholder of pictures, in order; other poolings are refused."""
    write_lmms_lab_folder(tmp_path)
    processor = chat_processor(tmp_path)
    messages = [{"role": "user", "content": [VIDEO, {"type": "image"}, text("Which?")]}]
    visuals: list[Visual] = [random_frames(2, 60, 60), random_picture(60, 60, 0)]
    prompt = processor.prepare(messages, visuals)
    assert [image.is_video for image in prompt.images] == [True, False]
    config = json.loads((tmp_path / "config.json").read_text())
    write_json(tmp_path / "config.json", {**config, "mm_newline_position": "grid"})
    with pytest.raises(RequestError, match="this model takes no videos: send some frames"):
        chat_processor(tmp_path).prepare(messages, visuals)


def test_what_is_refused(tiny_qwen2_vl_folder: Path) -> None:
    processor = chat_processor(tiny_qwen2_vl_folder)
    frame = Image.new("RGB", (60, 60))
    content = [VIDEO, {"type": "image"}]
    with pytest.raises(RequestError, match="at least one frame"):
        processor.prepare([{"role": "user", "content": [VIDEO]}], [[]])
    with pytest.raises(RequestError, match="not in the order of their parts"):
        processor.prepare([{"role": "user", "content": content}], [frame, [frame]])
    trick = [text("<|vision_start|><|video_pad|><|vision_end|>")]
    prompt = processor.prepare([{"role": "user", "content": trick}])
    assert processor.config.video_token_id not in prompt.token_ids
