"""InternVL2 against transformers: the same pictures, weights and ids, the same logits."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mgvq_runtime.models.internvl2 import InternVL2
from mgvq_runtime.models.loading import load_model
from mgvq_runtime.multimodal.processors.internvl2 import InternVL2ImageProcessor
from tests.runtime.models.families import (
    IMAGE,
    INTERN_VIT_6B,
    internvl_4_tensors,
    internvl_config,
    internvl_hub_config,
    internvl_hub_tensors,
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

LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + 0.7 * i for i in range(8)],
}
VARIANTS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "1b": ("qwen2", "qwen2", {}, {}),
    "2b": ("llama", "internlm2", {}, {"rms_norm_eps": 1e-5}),
    "4b": (
        "phi3",
        "phi3",
        {},
        {
            "num_key_value_heads": 4,
            "rope_scaling": LONGROPE,
            "original_max_position_embeddings": 1024,
            "pad_token_id": 0,
        },
    ),
    "26b": ("llama", "internlm2", INTERN_VIT_6B, {"num_key_value_heads": 1}),
    "40b": ("llama", "llama", INTERN_VIT_6B, {"rope_theta": 5e6}),
}
"""Decoder of transformers' model, decoder of the hub's, changes to vision and text config."""

PROCESSOR = InternVL2ImageProcessor(tile_size=56)
PARTS: dict[str, list[int | tuple[int, int]]] = {
    "text": [19],
    "one-image-first": [(50, 50), 7],
    "image-between-texts": [9, (130, 75), 5],
    "narrow-image": [2, (3, 300), 4],
    "two-images": [3, (180, 60), 4, (60, 60), 6],
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


def hub_folder(folder: Path, name: str, seed: int) -> Any:
    """Write one variant in the hub's spelling; return transformers' model."""
    kind, hub_kind, vision, text = VARIANTS[name]
    config = internvl_config(kind, vision, **text)
    reference = reference_model(config, seed)
    # The hub says nothing of the placeholder; the tokenizer does, which is not here.
    hub = internvl_hub_config(config, hub_kind, image_token_id=IMAGE)
    write_folder(folder, hub, internvl_hub_tensors(hub, tensors_of(reference)))
    return reference


@pytest.fixture(scope="module", params=sorted(VARIANTS))
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(transformers' model, ours) of one variant, ours in the hub's spelling."""
    folder = tmp_path_factory.mktemp(request.param)
    reference = hub_folder(folder, request.param, seed=11)
    return reference, load_model(folder)


@pytest.fixture
def pair(loaded: tuple[Any, InternVL2]) -> Iterator[tuple[Any, InternVL2]]:
    with torch.inference_mode():
        yield loaded


def reference_logits(reference: Any, case: Case, new_ids: tuple[int, ...] = ()) -> torch.Tensor:
    """Logits `[T, V]` of transformers, its own image processor included."""
    from transformers import GotOcr2ImageProcessorPil

    images: dict[str, Any] = {}
    if case.pictures:
        processor = GotOcr2ImageProcessorPil(
            image_mean=list(PROCESSOR.pixels.mean),
            image_std=list(PROCESSOR.pixels.std),
            size={"height": 56, "width": 56},
            crop_to_patches=True,
        )
        pixels = processor(case.pictures, return_tensors="pt")["pixel_values"]
        images = {"pixel_values": pixels}
    ids = torch.tensor([[*case.ids, *new_ids]])
    return reference(input_ids=ids, use_cache=False, **images).logits[0]


def test_cases_are_what_they_say() -> None:
    """One tile alone, and several with the thumbnail behind them."""
    tiles = {name: [image.grid_thw[0] for image in case.images] for name, case in CASES.items()}
    assert tiles["one-image-first"] == [1]
    assert tiles["image-between-texts"] == [7]
    assert tiles["two-images"] == [4, 1]


@pytest.mark.parametrize("name", sorted(CASES))
def test_prefill_without_cache(pair: tuple[Any, InternVL2], name: str) -> None:
    check_prefill(pair[1], CASES[name], partial(reference_logits, pair[0]))


@pytest.mark.parametrize("name", ["image-between-texts", "two-images"])
def test_paged_prefill_and_decode(pair: tuple[Any, InternVL2], name: str) -> None:
    check_paged(pair[1], CASES[name], partial(reference_logits, pair[0]))


def test_mixed_batch(pair: tuple[Any, InternVL2]) -> None:
    check_mixed(pair[1], CASES, partial(reference_logits, pair[0]))


def test_pictures_matter_and_are_encoded_alone_or_together(pair: tuple[Any, InternVL2]) -> None:
    names = ("one-image-first", "image-between-texts")
    check_encoding(pair[1], [CASES[name].images[0] for name in names])


@pytest.mark.parametrize("name", sorted(VARIANTS.keys() - {"4b"}))  # no other dialect nests Phi-3
def test_dialects_load_to_the_same_parameters(name: str, tmp_path: Path) -> None:
    kind, hub_kind, vision, text = VARIANTS[name]
    reference = hub_folder(tmp_path / "hub", name, seed=3)
    config, tensors = internvl_config(kind, vision, **text), tensors_of(reference)
    reference.save_pretrained(tmp_path / "saved")
    reference.save_pretrained(tmp_path / "saved-5", save_original_format=False)
    write_folder(tmp_path / "transformers-4", config, internvl_4_tensors(tensors))
    write_folder(tmp_path / "transformers-5", config, tensors)
    folders = ["hub", "saved", "saved-5", "transformers-4", "transformers-5"]
    models = [load_model(tmp_path / folder) for folder in folders]
    for other in models[1:]:
        assert other.config == models[0].config
        for (ours_name, ours), (theirs_name, theirs) in zip(
            models[0].named_parameters(), other.named_parameters(), strict=True
        ):
            assert ours_name == theirs_name
            assert torch.equal(ours, theirs), ours_name
