"""Videos against transformers: the same frames, weights and ids, the same logits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mgvq_runtime.layers.forward_batch import ForwardBatch
from mgvq_runtime.models.causal_lm import CausalLM
from mgvq_runtime.models.loading import load_model
from mgvq_runtime.models.vision import frame_runs
from mgvq_runtime.multimodal.image import Visual
from mgvq_runtime.multimodal.processors import ImageProcessor
from mgvq_runtime.multimodal.processors.internvl2 import InternVL2ImageProcessor
from mgvq_runtime.multimodal.processors.llava_onevision import LlavaOnevisionImageProcessor
from mgvq_runtime.multimodal.processors.qwen2_vl import Qwen2VLImageProcessor
from mgvq_runtime.multimodal.prompt import build_prompt
from mgvq_runtime.request import Prompt
from tests.runtime.conftest import hub_config, random_reference
from tests.runtime.models.families import (
    IMAGE,
    internvl_config,
    llava_config,
    reference_model,
    tensors_of,
    write_folder,
)
from tests.runtime.models.test_parity_qwen2_vl import IDS
from tests.runtime.models.tiled_parity import TOLERANCE, difference
from tests.runtime.multimodal.tiled_sizes import random_picture
from tests.runtime.multimodal.video_reference import (
    internvl_video,
    llava_video,
    qwen2_vl_video,
    random_frames,
)

VIDEO = IMAGE + 1
QWEN2_VIDEO = IDS["<|video_pad|>"]


def ours(
    model: CausalLM,
    processor: ImageProcessor,
    ids: Sequence[int],
    visuals: Sequence[Visual],
    max_patches: int | None = None,
) -> tuple[torch.Tensor, Prompt]:
    """Logits `[T, V]` and the prompt; ids have one placeholder an image."""
    images = [
        image
        for visual in visuals
        for image in (
            (processor(visual),) if isinstance(visual, Image.Image) else processor.video(visual)
        )
    ]
    prompt = build_prompt(ids, images, model.config)
    token_ids = torch.tensor(prompt.token_ids)
    rows = model.encode_images(
        torch.cat([torch.from_numpy(image.patches) for image in prompt.images]),
        [image.grid_thw for image in prompt.images],
        [image.layout for image in prompt.images],
        max_patches,
    )
    embeds = model.embed(token_ids).clone()
    embeds[torch.isin(token_ids, torch.tensor(model.config.placeholder_ids))] = rows
    positions = torch.from_numpy(prompt.positions)
    return model.logits(model(embeds, ForwardBatch.of_sequence(positions))), prompt


@pytest.fixture(scope="module")
def qwen2_vl(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, CausalLM]:
    reference = random_reference(hub_config(IDS), seed=11)
    folder = tmp_path_factory.mktemp("qwen2-vl")
    reference.save_pretrained(folder, save_original_format=False)
    return reference, load_model(folder)


@torch.inference_mode()
def test_qwen2_vl(qwen2_vl: tuple[Any, CausalLM]) -> None:
    """Five frames (the last is repeated), a picture behind them, all axes of the rope apart."""
    reference, model = qwen2_vl
    processor = Qwen2VLImageProcessor()
    frames, picture = random_frames(5, 90, 120), random_picture(60, 60, 7)
    found, prompt = ours(model, processor, [1, 2, QWEN2_VIDEO, 3, IMAGE, 4], [frames, picture])
    patches, grid = qwen2_vl_video(processor, frames)
    assert prompt.images[0].grid_thw == tuple(grid) == (3, 8, 6)
    ids = torch.tensor([prompt.token_ids])
    reference.model.rope_deltas = None
    expected = reference(
        input_ids=ids,
        pixel_values_videos=patches,
        video_grid_thw=torch.tensor([grid]),
        pixel_values=torch.from_numpy(prompt.images[1].patches),
        image_grid_thw=torch.tensor([prompt.images[1].grid_thw]),
        mm_token_type_ids=(ids == IMAGE).int() + 2 * (ids == QWEN2_VIDEO).int(),
        use_cache=False,
    ).logits[0]
    assert difference(found, expected) <= TOLERANCE


@torch.inference_mode()
def test_qwen2_vl_with_more_frames_than_rows(qwen2_vl: tuple[Any, CausalLM]) -> None:
    """The text begins above the last frame, as in transformers 4: 5.24 is told the positions."""
    reference, model = qwen2_vl
    processor = Qwen2VLImageProcessor()
    frames = random_frames(14, 60, 50)
    found, prompt = ours(model, processor, [1, QWEN2_VIDEO, 2, 3], [frames], max_patches=40)
    patches, grid = qwen2_vl_video(processor, frames)
    assert grid == [7, 4, 4]
    assert prompt.positions[:, -1].tolist() == [1 + 7 + 1] * 3
    expected = reference(
        input_ids=torch.tensor([prompt.token_ids]),
        pixel_values_videos=patches,
        video_grid_thw=torch.tensor([grid]),
        position_ids=torch.from_numpy(prompt.positions)[:, None],
        use_cache=False,
    ).logits[0]
    assert difference(found, expected) <= TOLERANCE


@torch.inference_mode()
@pytest.mark.parametrize("tile_size", [60, 74], ids=["even", "odd"])
def test_llava_onevision(tmp_path: Path, tile_size: int) -> None:
    """Frames of several shapes; a side of five patches is halved to three."""
    config = llava_config()
    config["vision_config"]["image_size"] = tile_size
    reference = reference_model(config, seed=11)
    model = load_model(write_folder(tmp_path, config, tensors_of(reference)))
    processor = LlavaOnevisionImageProcessor((), tile_size=tile_size)
    frames: list[Image.Image] = [*random_frames(2, 90, 50), *random_frames(1, 30, 80, seed=1)]
    found, prompt = ours(model, processor, [1, 2, VIDEO, 3, 4], [frames], max_patches=30)
    assert prompt.images[0].num_tokens == 3 * (2 if tile_size == 60 else 3) ** 2 + 1
    expected = reference(
        input_ids=torch.tensor([prompt.token_ids]),
        pixel_values_videos=llava_video(processor, frames),
        use_cache=False,
    ).logits[0]
    assert difference(found, expected) <= TOLERANCE


@torch.inference_mode()
def test_internvl2(tmp_path: Path) -> None:
    """Each frame is a picture of one tile, behind a placeholder of its own."""
    config = internvl_config()
    reference = reference_model(config, seed=11)
    model = load_model(write_folder(tmp_path, config, tensors_of(reference)))
    processor = InternVL2ImageProcessor(tile_size=56)
    frames = random_frames(3, 150, 60)
    found, prompt = ours(model, processor, [1, IMAGE, 2, IMAGE, 3, IMAGE, 4], [frames])
    assert [image.grid_thw for image in prompt.images] == [(1, 4, 4)] * 3
    expected = reference(
        input_ids=torch.tensor([prompt.token_ids]),
        pixel_values=internvl_video(processor, frames),
        use_cache=False,
    ).logits[0]
    assert difference(found, expected) <= TOLERANCE


def test_long_videos_run_in_parts() -> None:
    """Cut between frames only, in order, as full as they may be."""
    grids = [(1, 2, 2), (5, 2, 4), (1, 8, 8), (2, 2, 2)]
    assert frame_runs(grids, 20) == [
        [(1, 2, 2), (2, 2, 4)],
        [(2, 2, 4)],
        [(1, 2, 4)],
        [(1, 8, 8)],
        [(2, 2, 2)],
    ]
    assert frame_runs(grids, 1000) == [grids]
