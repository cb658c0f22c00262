"""Qwen2-VL against transformers: tiny random models, the same weights, the same logits."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from mgvq_runtime.layers.forward_batch import ForwardBatch
from mgvq_runtime.models.loading import load_model
from mgvq_runtime.models.qwen2_vl import Qwen2VL
from tests.runtime.conftest import hub_config, hub_key, random_reference, write_json
from tests.runtime.models.paged import PagedRunner, start

TOLERANCE = 2e-4
IMAGE, VISION_START, VISION_END = 470, 471, 472
IDS = {
    "<|endoftext|>": 473,
    "<|im_end|>": 474,
    "<|vision_start|>": VISION_START,
    "<|vision_end|>": VISION_END,
    "<|image_pad|>": IMAGE,
    "<|video_pad|>": 475,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "gqa-tied": {},
    "mha-untied": {
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
        "hidden_size": 128,
        "rope_scaling": {"type": "mrope", "mrope_section": [8, 4, 4]},
        "rope_theta": 1000000.0,
    },
    "mqa-one-axis-empty": {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_hidden_layers": 3,
        "rope_scaling": {"type": "mrope", "mrope_section": [0, 6, 10]},
    },
}
VISION: dict[str, dict[str, Any]] = {
    "mha-untied": {"embed_dim": 48, "num_heads": 3, "depth": 3, "mlp_ratio": 2},
    "mqa-one-axis-empty": {"embed_dim": 40, "num_heads": 1, "depth": 1},
}


@dataclass(frozen=True)
class Case:
    """A prompt with its images."""

    ids: list[int]
    grids: list[tuple[int, int, int]]
    patches: torch.Tensor


def make_case(parts: list[int | tuple[int, int, int]], seed: int) -> Case:
    """Numbers are runs of text, tuples are the grids of images."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    grids = []
    for part in parts:
        if isinstance(part, int):
            ids += torch.randint(0, 460, (part,), generator=generator).tolist()
        else:
            t, h, w = part
            ids += [VISION_START] + [IMAGE] * (t * h * w // 4) + [VISION_END]
            grids.append(part)
    num_patches = sum(t * h * w for t, h, w in grids)
    return Case(ids, grids, torch.randn(num_patches, 1176, generator=generator))


CASES = {
    "text": make_case([19], 1),
    "one-image-first": make_case([(1, 4, 6), 7], 2),
    "image-between-texts": make_case([9, (1, 6, 2), 5], 3),
    "three-images": make_case([3, (1, 4, 4), (1, 2, 8), 4, (1, 6, 6), 6], 4),
}


@pytest.fixture(scope="module", params=sorted(VARIANTS))
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(transformers' model, ours) of one variant."""
    config = hub_config(IDS, **copy.deepcopy(VARIANTS[request.param]))
    config["vision_config"].update(VISION.get(request.param, {}))
    reference = random_reference(config, seed=11)
    folder = tmp_path_factory.mktemp(request.param)
    reference.save_pretrained(folder, save_original_format=False)
    return reference, load_model(folder)


@pytest.fixture
def pair(loaded: tuple[Any, Qwen2VL]) -> Iterator[tuple[Any, Qwen2VL]]:
    with torch.inference_mode():
        yield loaded


def reference_logits(reference: Any, case: Case, new_ids: list[int] = []) -> torch.Tensor:  # noqa: B006
    """Logits `[T, V]` of transformers over the whole sequence at once."""
    ids = torch.tensor([case.ids + new_ids])
    reference.model.rope_deltas = None
    images: dict[str, Any] = {}
    if case.grids:
        images = {
            "pixel_values": case.patches,
            "image_grid_thw": torch.tensor(case.grids),
            "mm_token_type_ids": (ids == IMAGE).int(),
        }
    return reference(input_ids=ids, use_cache=False, **images).logits[0]


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    assert theirs.abs().max() > 1.0  # not a comparison of zeros
    worst = float((ours - theirs).abs().max())
    print(f"max |difference| {worst:.2e}")
    return worst


@pytest.mark.parametrize("name", sorted(CASES))
def test_prefill_without_cache(pair: tuple[Any, Qwen2VL], name: str) -> None:
    reference, model = pair
    case = CASES[name]
    sequence = start(model, case.ids, case.patches, case.grids)
    hidden = model(sequence.embeds, ForwardBatch.of_sequence(sequence.positions))
    assert difference(model.logits(hidden), reference_logits(reference, case)) <= TOLERANCE


@pytest.mark.parametrize("chunk", [1000, 5], ids=["whole", "chunks-of-5"])
@pytest.mark.parametrize("name", sorted(CASES))
def test_paged_prefill_and_decode(pair: tuple[Any, Qwen2VL], name: str, chunk: int) -> None:
    """Prompt in chunks (some end inside an image), then token by token, as transformers' cache."""
    reference, model = pair
    case, new_ids = CASES[name], [17, 401, 3, 99]
    sequence = start(model, case.ids, case.patches, case.grids)
    runner = PagedRunner(model)
    parts = []
    while sequence.num_done < len(case.ids):
        parts += runner.step([(sequence, min(chunk, len(case.ids) - sequence.num_done))])
    for token in new_ids:
        sequence.append(model, token)
        parts += runner.step([(sequence, 1)])
    theirs = reference_logits(reference, case, new_ids)
    assert difference(torch.cat(parts), theirs) <= TOLERANCE


def test_decode_follows_transformers_own_cache(pair: tuple[Any, Qwen2VL]) -> None:
    """Greedy continuation, each side with its own cache and its own positions."""
    reference, model = pair
    case = CASES["three-images"]
    reference.model.rope_deltas = None
    ids = torch.tensor([case.ids])
    theirs = reference(
        input_ids=ids,
        pixel_values=case.patches,
        image_grid_thw=torch.tensor(case.grids),
        mm_token_type_ids=(ids == IMAGE).int(),
        use_cache=True,
    )
    sequence = start(model, case.ids, case.patches, case.grids)
    runner = PagedRunner(model)
    (ours,) = runner.step([(sequence, len(case.ids))])
    for _ in range(6):
        assert difference(ours[-1], theirs.logits[0, -1]) <= TOLERANCE
        token = int(theirs.logits[0, -1].argmax())
        assert int(ours[-1].argmax()) == token
        sequence.append(model, token)
        (ours,) = runner.step([(sequence, 1)])
        cache_ = theirs.past_key_values
        theirs = reference(input_ids=torch.tensor([[token]]), past_key_values=cache_)


def test_mixed_batch(pair: tuple[Any, Qwen2VL]) -> None:
    """Decoding, a whole prompt and a chunk that ends inside an image, in one forward."""
    reference, model = pair
    runner = PagedRunner(model)
    decoding, whole, chunked = (
        start(model, CASES[n].ids, CASES[n].patches, CASES[n].grids)
        for n in ("one-image-first", "text", "three-images")
    )
    runner.step([(decoding, len(decoding.ids)), (chunked, 5)])
    decoding.append(model, 42)
    logits = runner.step([(decoding, 1), (whole, len(whole.ids)), (chunked, 17)])
    assert CASES["three-images"].ids[21] == CASES["three-images"].ids[22] == IMAGE
    expected = [
        reference_logits(reference, CASES["one-image-first"], [42])[-1:],
        reference_logits(reference, CASES["text"]),
        reference_logits(reference, CASES["three-images"])[5:22],
    ]
    for ours, theirs in zip(logits, expected, strict=True):
        assert difference(ours, theirs) <= TOLERANCE


def test_images_alone_and_together_and_frames(pair: tuple[Any, Qwen2VL]) -> None:
    """Images and frames never attend to each other; features are transformers' own."""
    reference, model = pair
    grids = [(1, 4, 6), (2, 2, 4), (1, 4, 4)]
    sizes = [t * h * w for t, h, w in grids]
    patches = torch.randn(sum(sizes), 1176, generator=torch.Generator().manual_seed(5))
    together = model.encode_images(patches, grids)
    theirs = reference.model.visual(patches, grid_thw=torch.tensor(grids)).pooler_output
    assert difference(together, theirs) <= TOLERANCE
    alone = [
        model.encode_images(part, [grid])
        for part, grid in zip(patches.split(sizes), grids, strict=True)
    ]
    assert difference(torch.cat(alone), together) <= 1e-5


def test_every_image_and_every_token_matters(pair: tuple[Any, Qwen2VL]) -> None:
    """The parity above would not see an ignored image if transformers ignored it as well."""
    _, model = pair
    case = CASES["one-image-first"]
    logits = []
    for patches in (case.patches, case.patches.flip(0)):
        sequence = start(model, case.ids, patches, case.grids)
        hidden = model(sequence.embeds, ForwardBatch.of_sequence(sequence.positions))
        logits.append(model.logits(hidden)[-1])
    assert (logits[0] - logits[1]).abs().max() > 1e-3


def test_gradients_flow_without_a_cache(tmp_path: Path) -> None:
    """Calibration differentiates through the graph, patches and embeddings alike."""
    config = hub_config(IDS)
    random_reference(config, seed=3).save_pretrained(tmp_path)
    model = load_model(tmp_path)
    embeds = torch.randn(6, 64, requires_grad=True)
    positions = torch.arange(6).expand(3, 6)
    loss = model.logits(model(embeds, ForwardBatch.of_sequence(positions)))[-1].logsumexp(0)
    (gradient,) = torch.autograd.grad(loss, embeds)
    assert (gradient.abs().sum(dim=1) > 0).all()
    patches = torch.randn(16, 1176, requires_grad=True)
    (gradient,) = torch.autograd.grad(model.encode_images(patches, [(1, 4, 4)]).sum(), patches)
    assert gradient.abs().sum() > 0


def test_dialects_load_to_the_same_parameters(tmp_path: Path) -> None:
    """Hub names and flat config, transformers 5's own names, and its default mix of the two."""
    config = hub_config(IDS)
    reference = random_reference(config, seed=3)
    folders = [tmp_path / name for name in ("hub", "v5", "v5-with-hub-names")]
    folders[0].mkdir()
    from safetensors.torch import save_file

    tensors = {hub_key(n): p.detach().contiguous() for n, p in reference.named_parameters()}
    save_file(tensors, folders[0] / "model.safetensors")
    write_json(folders[0] / "config.json", config)
    reference.save_pretrained(folders[1], save_original_format=False)
    reference.save_pretrained(folders[2])
    models = [load_model(folder) for folder in folders]
    for other in models[1:]:
        assert other.config == models[0].config
        assert [n for n, _ in other.named_parameters()] == [
            n for n, _ in models[0].named_parameters()
        ]
        for (name, ours), theirs in zip(
            models[0].named_parameters(), other.parameters(), strict=True
        ):
            assert torch.equal(ours, theirs), name
