"""Qwen2-VL's image processor against transformers' PIL one: same grids, same pixels."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mgvq_runtime.errors import ConfigError, ImageError
from mgvq_runtime.multimodal.processors.qwen2_vl import Qwen2VLImageProcessor, smart_resize
from tests.runtime.conftest import PREPROCESSOR_CONFIG

EXTREMES = [(1, 1), (1, 200), (200, 1), (2, 399), (28, 28), (14, 42), (27, 5400), (3000, 15)]
LARGE = [(4000, 3000), (2999, 4001)]


def reference_processor(**size: int) -> Any:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
        Qwen2VLImageProcessorPil,
    )

    return Qwen2VLImageProcessorPil(**{**PREPROCESSOR_CONFIG, **size})


def picture(width: int, height: int, seed: int) -> Image.Image:
    """Noise of a few pixels a patch over a gradient: nothing that resizing would hide."""
    generator = np.random.default_rng(seed)
    small = generator.integers(0, 256, (height // 7 + 1, width // 7 + 1, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize((width, height), Image.Resampling.NEAREST)
    return image


def random_size(rng: random.Random) -> tuple[int, int]:
    side = round(10 ** rng.uniform(0, 2.7))
    ratio = 10 ** rng.uniform(0, 2.3) if rng.random() < 0.3 else rng.uniform(1, 3)
    sides = (side, max(1, min(round(side * ratio), 4000)))
    return sides if rng.random() < 0.5 else (sides[1], sides[0])


def test_200_random_sizes_are_transformers_own() -> None:
    rng = random.Random(1)
    sizes = EXTREMES + [random_size(rng) for _ in range(200 - len(EXTREMES))]
    num_shrunk = num_grown = 0
    for seed, (width, height) in enumerate(sizes):
        max_pixels = rng.choice([28 * 28 * 4, 28 * 28 * 50, 28 * 28 * 90])
        min_pixels = rng.choice([3136, 784, 3136])
        image = picture(width, height, seed)
        ours = Qwen2VLImageProcessor(min_pixels=min_pixels, max_pixels=max_pixels)
        reference = reference_processor(min_pixels=min_pixels, max_pixels=max_pixels)
        theirs = reference(images=[image], return_tensors="np")
        result = ours(image)
        assert result.grid_thw == tuple(theirs["image_grid_thw"][0].tolist()), (width, height)
        assert result.num_tokens == theirs["image_grid_thw"][0].prod() // 4
        assert result.patches.dtype == np.float32
        assert np.array_equal(result.patches, theirs["pixel_values"]), (width, height)
        assert result.num_tokens <= ours.max_num_tokens
        area = result.num_tokens * 784
        num_shrunk += area < width * height
        num_grown += area > width * height
    assert min(num_shrunk, num_grown) > 30


@pytest.mark.parametrize(("width", "height"), LARGE)
def test_large_pictures(width: int, height: int) -> None:
    image = picture(width, height, 0)
    ours = Qwen2VLImageProcessor(max_pixels=28 * 28 * 256)(image)
    theirs = reference_processor(max_pixels=28 * 28 * 256)(images=[image], return_tensors="np")
    assert ours.grid_thw == tuple(theirs["image_grid_thw"][0].tolist())
    assert np.array_equal(ours.patches, theirs["pixel_values"])


@pytest.mark.parametrize("mode", ["L", "RGBA", "LA", "P", "1", "CMYK"])
def test_modes_are_converted_as_transformers_does(mode: str) -> None:
    image = picture(90, 60, 3)
    if "A" in mode:
        alpha = Image.linear_gradient("L").resize(image.size)
        image = image.convert("RGB")
        image.putalpha(alpha)
    image = image.convert(mode)
    ours = Qwen2VLImageProcessor()(image)
    theirs = reference_processor()(images=[image], return_tensors="np")["pixel_values"]
    assert np.array_equal(ours.patches, theirs)


def test_too_narrow() -> None:
    processor = Qwen2VLImageProcessor()
    processor.grid_of(200, 1)
    with pytest.raises(ImageError, match="201 x 1: one side may be at most 200 times the other"):
        processor(Image.new("RGB", (201, 1)))


def test_smart_resize_rounds_to_even_as_python_does() -> None:
    assert smart_resize(42, 70, 28, 1, 10**9) == (56, 56)  # 1.5 -> 2, 2.5 -> 2


def test_cap_on_tokens(tiny_qwen2_vl_folder: Path) -> None:
    free = Qwen2VLImageProcessor.from_folder(tiny_qwen2_vl_folder)
    assert (free.min_pixels, free.max_pixels) == (3136, 12845056)
    capped = Qwen2VLImageProcessor.from_folder(tiny_qwen2_vl_folder, max_image_tokens=16)
    assert capped.max_pixels == 16 * 784
    assert capped(picture(640, 480, 0)).num_tokens <= 16 < free(picture(640, 480, 0)).num_tokens
    assert Qwen2VLImageProcessor.from_folder(tiny_qwen2_vl_folder, 10**6).max_pixels == 12845056
    one = free.capped(1)
    assert one(picture(300, 300, 0)).num_tokens == 1
    with pytest.raises(ConfigError, match="max_image_tokens must be at least 1, got 0"):
        free.capped(0)


def test_max_num_tokens_bounds_every_size() -> None:
    rng = random.Random(2)
    for tokens, least in [(1, 784), (4, 3136), (50, 3136), (199, 3136), (300, 300 * 784), (640, 9)]:
        processor = Qwen2VLImageProcessor(min_pixels=least, max_pixels=tokens * 784)
        for _ in range(500):
            width = rng.randint(1, 5000)
            height = rng.randint(-(-width // 200), min(5000, width * 200))
            _, rows, columns = processor.grid_of(height, width)
            assert rows * columns // 4 <= processor.max_num_tokens, (width, height, tokens)


def write(folder: Path, name: str, values: object) -> Path:
    (folder / name).write_text(json.dumps(values))
    return folder


def test_transformers_5_files(tmp_path: Path) -> None:
    """The size as edges, in a file of its own or inside processor_config.json."""
    reference = reference_processor()
    reference.save_pretrained(tmp_path)
    saved = next(tmp_path.glob("*processor_config.json"))
    values = json.loads(saved.read_text())
    assert "size" in str(values)
    expected = Qwen2VLImageProcessor(3136, 12845056, frame_max_pixels=12845056)
    assert Qwen2VLImageProcessor.from_folder(tmp_path) == expected
    nested = tmp_path / "nested"
    nested.mkdir()
    write(nested, "processor_config.json", {"image_processor": values})
    assert Qwen2VLImageProcessor.from_folder(nested) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"do_normalize": False}, "preprocessor_config.json: do_normalize must be true"),
        ({"resample": 9}, "resample must be a resampling filter"),
        ({"min_pixels": "many"}, "min_pixels must be an integer of at least 1, got 'many'"),
        ({"image_mean": [0.5]}, "image_mean must be a list of 3 numbers"),
        ({"image_std": [0.5, 0, 1]}, "image_std must be three numbers above 0"),
        ({"patch_size": [14, 16]}, "patch_size must be one integer"),
        ({"rescale_factor": 1e300}, "rescale_factor must be one that leaves pixel values finite"),
        ({"image_std": [1e-320, 1, 1]}, "must be one that leaves pixel values finite"),
        ({"image_mean": [10**400, 0, 0]}, "image_mean must be a list of 3 numbers"),
        ({"rescale_factor": 10**400}, "rescale_factor must be a number above 0"),
    ],
)
def test_files_that_cannot_be_honoured(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    write(tmp_path, "preprocessor_config.json", {**PREPROCESSOR_CONFIG, **change})
    with pytest.raises(ConfigError, match=message):
        Qwen2VLImageProcessor.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 16}, r"patch_size must be 14, vision_config.patch_size of config.json"),
        ({"temporal_patch_size": 1}, "temporal_patch_size must be 2, vision_config.temporal_patch"),
        ({"merge_size": 4}, "merge_size must be 2, vision_config.spatial_merge_size of config"),
    ],
)
@pytest.mark.parametrize("name", ["preprocessor_config.json", "video_preprocessor_config.json"])
def test_patches_must_be_the_vision_towers(
    tiny_qwen2_vl_folder: Path, tmp_path: Path, name: str, change: dict[str, Any], message: str
) -> None:
    """Else the first picture would fail inside a step, and end the engine for everybody."""
    for file in ("config.json", "preprocessor_config.json"):
        (tmp_path / file).write_bytes((tiny_qwen2_vl_folder / file).read_bytes())
    Qwen2VLImageProcessor.from_folder(tmp_path)
    write(tmp_path, name, {**PREPROCESSOR_CONFIG, **change})
    with pytest.raises(ConfigError, match=f"^{name}: {message}"):
        Qwen2VLImageProcessor.from_folder(tmp_path)


def test_the_nested_file_goes_first_as_in_transformers(tmp_path: Path) -> None:
    """transformers 5 writes it beside the older one, which it leaves as it was."""
    from transformers import Qwen2VLImageProcessorPil

    write(tmp_path, "preprocessor_config.json", PREPROCESSOR_CONFIG)
    write(tmp_path, "processor_config.json", {"processor_class": "Qwen2VLProcessor"})
    assert Qwen2VLImageProcessor.from_folder(tmp_path).max_pixels == 12845056
    size = {"shortest_edge": 3136, "longest_edge": 28 * 28 * 4}
    write(tmp_path, "processor_config.json", {"image_processor": {"size": size}})
    theirs = Qwen2VLImageProcessorPil.from_pretrained(tmp_path).size
    ours = Qwen2VLImageProcessor.from_folder(tmp_path)
    assert ours.max_pixels == theirs["longest_edge"] == size["longest_edge"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000 + "]" * 100_000, "is nested too deeply"),
        ('{"image_mean": [0.5, 0.5, 0.5], "image_mean": [0, 0, 0]}', "'image_mean' is given twice"),
        ('{"a": "' + "a" * 16 * 2**20 + '"}', "is larger than 16777216 bytes"),
        ('{"a": ' + "1" * 5000 + "}", "is not valid JSON"),
    ],
    ids=["deep", "twice", "large", "long number"],
)
def test_hostile_files(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(ConfigError, match=f"preprocessor_config.json .*{message}"):
        Qwen2VLImageProcessor.from_folder(tmp_path)


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has neither preprocessor_config.json nor"):
        Qwen2VLImageProcessor.from_folder(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ConfigError, match="is not valid JSON"):
        Qwen2VLImageProcessor.from_folder(tmp_path)
    write(tmp_path, "preprocessor_config.json", [1])
    with pytest.raises(ConfigError, match="does not describe an image processor"):
        Qwen2VLImageProcessor.from_folder(tmp_path)
