"""LLaVA-OneVision against transformers: the same pictures, weights and ids, the same logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mgvq_runtime.models.llava_onevision import LlavaOnevision
from mgvq_runtime.models.loading import load_model
from mgvq_runtime.multimodal.processors.llava_onevision import LlavaOnevisionImageProcessor
from tests.runtime.models.families import (
    IMAGE,
    PINPOINTS,
    llava_4_tensors,
    llava_config,
    lmms_lab_config,
    lmms_lab_tensors,
    reference_model,
    tensors_of,
    write_folder,
)
from tests.runtime.models.tiled_parity import (
    Case,
    check_encoding,
    check_mixed,
    check_paged,
    check_prefill,
)

VARIANTS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "tied-mha": {"tie_word_embeddings": True, "num_key_value_heads": 4, "num_hidden_layers": 3},
}
PROCESSOR = LlavaOnevisionImageProcessor(
    tuple((height, width) for height, width in PINPOINTS), tile_size=60
)
PARTS: dict[str, list[int | tuple[int, int]]] = {
    "text": [19],
    "one-image-first": [(50, 40), 7],
    "image-between-texts": [9, (130, 75), 5],
    "shrunk-image": [3, (360, 352), 4],
    "narrow-image": [2, (3, 300), 4],
    "two-images": [3, (80, 61), 4, (60, 60), 6],
    "three-images": [(200, 61), (12, 90), 4, (61, 30), 6],
}
"""Numbers are runs of text, pairs are the sizes (width, height) of pictures."""


def make_case(parts: list[int | tuple[int, int]], seed: int) -> Case:
    rng = np.random.default_rng(seed)
    sizes = [part for part in parts if isinstance(part, tuple)]
    pictures = [
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for width, height in sizes
    ]
    images = [PROCESSOR(picture, len(pictures) == 1) for picture in pictures]
    counts = iter([image.num_tokens for image in images])
    ids: list[int] = []
    for part in parts:
        ids += (
            rng.integers(0, 460, part).tolist()
            if isinstance(part, int)
            else ([IMAGE] * next(counts))
        )
    return Case(ids, images, pictures)


CASES = {name: make_case(parts, seed) for seed, (name, parts) in enumerate(PARTS.items())}


@pytest.fixture(scope="module", params=sorted(VARIANTS))
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(transformers' model, ours) of one variant."""
    reference = reference_model(llava_config(**VARIANTS[request.param]), seed=11)
    folder = tmp_path_factory.mktemp(request.param)
    reference.save_pretrained(folder)
    return reference, load_model(folder)


@pytest.fixture
def pair(loaded: tuple[Any, LlavaOnevision]) -> Iterator[tuple[Any, LlavaOnevision]]:
    with torch.inference_mode():
        yield loaded


def reference_logits(reference: Any, case: Case, new_ids: tuple[int, ...] = ()) -> torch.Tensor:
    """Logits `[T, V]` of transformers, its own image processor included."""
    from transformers import LlavaOnevisionImageProcessorPil

    images: dict[str, Any] = {}
    if case.pictures:
        processor = LlavaOnevisionImageProcessorPil(
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
            size={"height": 60, "width": 60},
            image_grid_pinpoints=PINPOINTS,
        )
        images = dict(processor([case.pictures], return_tensors="pt"))
    ids = torch.tensor([[*case.ids, *new_ids]])
    return reference(input_ids=ids, use_cache=False, **images).logits[0]


def test_cases_are_what_they_say() -> None:
    """One large picture is interpolated, one keeps a rest of its padding, several are not cut."""
    layout = CASES["shrunk-image"].images[0].layout
    assert layout is not None
    assert layout.shrunk != layout.kept
    layout = CASES["narrow-image"].images[0].layout
    assert layout is not None
    assert layout.kept[1] < layout.columns * 4
    assert [image.num_tokens for image in CASES["three-images"].images] == [17, 17, 17]


@pytest.mark.parametrize("name", sorted(CASES))
def test_prefill_without_cache(pair: tuple[Any, LlavaOnevision], name: str) -> None:
    check_prefill(pair[1], CASES[name], partial(reference_logits, pair[0]))


@pytest.mark.parametrize("name", ["image-between-texts", "two-images"])
def test_paged_prefill_and_decode(pair: tuple[Any, LlavaOnevision], name: str) -> None:
    check_paged(pair[1], CASES[name], partial(reference_logits, pair[0]))


def test_mixed_batch(pair: tuple[Any, LlavaOnevision]) -> None:
    check_mixed(pair[1], CASES, partial(reference_logits, pair[0]))


def test_pictures_matter_and_are_encoded_alone_or_together(
    pair: tuple[Any, LlavaOnevision],
) -> None:
    names = ("one-image-first", "image-between-texts")
    check_encoding(pair[1], [CASES[name].images[0] for name in names])


def test_dialects_load_to_the_same_parameters(tmp_path: Path) -> None:
    config = llava_config()
    reference = reference_model(config, seed=3)
    tensors = tensors_of(reference)
    reference.save_pretrained(tmp_path / "saved")
    reference.save_pretrained(tmp_path / "saved-5", save_original_format=False)
    old = {
        n.replace("model.vision_tower.", "model.vision_tower.vision_model."): t
        for n, t in tensors.items()
    }
    folders = [
        write_folder(tmp_path / "transformers-5", config, tensors),
        tmp_path / "saved",
        tmp_path / "saved-5",
        write_folder(tmp_path / "old-siglip", config, old),
        write_folder(tmp_path / "transformers-4", config, llava_4_tensors(tensors)),
        write_folder(tmp_path / "lmms-lab", lmms_lab_config(config), lmms_lab_tensors(tensors)),
    ]
    models = [load_model(folder) for folder in folders]
    lmms_lab = models[-1].config  # its videos stand behind the placeholder of pictures
    assert lmms_lab.video_token_id == lmms_lab.image_token_id == IMAGE
    models[-1].config = dataclasses.replace(lmms_lab, video_token_id=IMAGE + 1)
    for other in models[1:]:
        assert other.config == models[0].config
        for (name, ours), (other_name, theirs) in zip(
            models[0].named_parameters(), other.named_parameters(), strict=True
        ):
            assert name == other_name
            assert torch.equal(ours, theirs), name
