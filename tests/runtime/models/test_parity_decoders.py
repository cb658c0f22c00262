"""Every decoder against transformers: tiny random models, the same weights, the same logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mgvq_runtime.checkpoint.reader import open_checkpoint
from mgvq_runtime.errors import CheckpointError, ConfigError
from mgvq_runtime.layers.forward_batch import ForwardBatch
from mgvq_runtime.models.causal_lm import CausalLM
from mgvq_runtime.models.loading import load_model
from tests.runtime.models.decoders import (
    DECODERS,
    decoder_config,
    hub_tensors,
    reference_decoder,
    write_decoder_folder,
)
from tests.runtime.models.paged import PagedRunner, Running

TOLERANCE = 2e-4
Pair = tuple[Any, CausalLM]


@pytest.fixture(scope="module", params=sorted(DECODERS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """(transformers' model, ours)."""
    folder = tmp_path_factory.mktemp(request.param)
    reference = write_decoder_folder(folder, request.param, seed=5)
    return reference, load_model(folder)


def random_ids(length: int, seed: int) -> list[int]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(3, 320, (length,), generator=draw).tolist()


@torch.inference_mode()
def reference_logits(reference: Any, ids: list[int]) -> Tensor:
    return reference(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def begin(model: CausalLM, ids: list[int]) -> Running:
    positions = torch.arange(len(ids)).expand(3, -1)
    return Running(list(ids), model.embed(torch.tensor(ids)), positions, 0)


def difference(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    assert theirs.abs().max() > 1.0  # not a comparison of zeros
    worst = float((ours - theirs).abs().max())
    print(f"max |difference| {worst:.2e}")
    return worst


@torch.inference_mode()
def test_prefill(pair: Pair) -> None:
    reference, model = pair
    ids = random_ids(60, 1)
    positions = torch.arange(len(ids)).expand(3, -1)
    hidden = model(model.embed(torch.tensor(ids)), ForwardBatch.of_sequence(positions))
    assert difference(model.logits(hidden), reference_logits(reference, ids)) <= TOLERANCE


@torch.inference_mode()
def test_cached_decode(pair: Pair) -> None:
    """A prompt in chunks of 7, then twelve tokens one by one, through the paged cache."""
    reference, model = pair
    ids = random_ids(40, 2)
    sequence, runner = begin(model, ids[:28]), PagedRunner(model)
    parts = [runner.step([(sequence, 7)])[0] for _ in range(4)]
    for token in ids[28:]:
        sequence.append(model, token)
        parts += runner.step([(sequence, 1)])
    assert difference(torch.cat(parts), reference_logits(reference, ids)) <= TOLERANCE


@torch.inference_mode()
def test_mixed_batch(pair: Pair) -> None:
    """Decodes, a whole prompt and a piece of one in the same forward."""
    reference, model = pair
    prompts = [random_ids(length, 10 + length) for length in (5, 33, 18)]
    runner = PagedRunner(model)
    running = [begin(model, ids) for ids in prompts]
    runner.step([(running[0], 4)])
    runner.step([(running[1], 30), (running[0], 1)])
    token = 77
    running[0].append(model, token)
    logits = runner.step([(running[0], 1), (running[2], 18), (running[1], 3)])
    expected = [
        reference_logits(reference, [*prompts[0], token])[-1:],
        reference_logits(reference, prompts[2]),
        reference_logits(reference, prompts[1])[-3:],
    ]
    assert difference(torch.cat(logits), torch.cat(expected)) <= TOLERANCE


@torch.inference_mode()
def test_longrope_chooses_by_the_context_in_use(tmp_path: Path) -> None:
    """transformers chooses by the length of each forward; we choose once, for all requests."""
    reference = write_decoder_folder(tmp_path, "phi3-su")
    model = load_model(tmp_path)

    def ours(ids: list[int]) -> Tensor:
        positions = torch.arange(len(ids)).expand(3, -1)
        embeds = model.embed(torch.tensor(ids))
        return model.logits(model(embeds, ForwardBatch.of_sequence(positions)))

    short, long = random_ids(64, 3), random_ids(100, 4)
    assert difference(ours(short), reference_logits(reference, short)) <= TOLERANCE
    assert (ours(long) - reference_logits(reference, long)).abs().max() > 0.01
    model.set_context_length(512)
    assert difference(ours(long), reference_logits(reference, long)) <= TOLERANCE
    assert (ours(short) - reference_logits(reference, short)).abs().max() > 0.01
    model.set_context_length(64)
    assert difference(ours(short), reference_logits(reference, short)) <= TOLERANCE


def parameters_of(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> Any:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return dict(open_checkpoint(folder).tensors())


@pytest.mark.parametrize("kind", ["llama", "internlm2", "internlm2-biases", "qwen2-tied"])
def test_dialects_give_bitwise_the_same_parameters(tmp_path: Path, kind: str) -> None:
    """The hub's own spelling, and the same model under transformers' names in shards."""
    config = decoder_config(kind)
    reference = reference_decoder(config, seed=8)
    read = parameters_of(tmp_path / "hub", hub_tensors(config, reference), config)
    reference.save_pretrained(tmp_path / "saved", max_shard_size="60kB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 2
    saved = dict(open_checkpoint(tmp_path / "saved").tensors())
    assert set(read) == set(saved)
    assert all(torch.equal(read[name], saved[name]) for name in read)


@pytest.mark.parametrize("kind", sorted(k for k in DECODERS if "internlm2" not in k))
def test_transformers_own_config_reads_alike(tmp_path: Path, kind: str) -> None:
    """transformers 5 writes other keys and leaves out defaults; the shapes are the same."""
    reference = write_decoder_folder(tmp_path / "hub", kind)
    reference.save_pretrained(tmp_path / "saved")
    hub, saved = load_model(tmp_path / "hub"), load_model(tmp_path / "saved")
    assert saved.config == hub.config
    for ours, theirs in zip(saved.parameters(), hub.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_phi3_is_llama_with_fused_names(tmp_path: Path) -> None:
    config = decoder_config("phi3")
    tensors = hub_tensors(config, reference_decoder(config))
    split: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if "qkv_proj" in name:
            parts = tensor.split((64, 64, 64))
            pairs = zip("qkv", parts, strict=True)
            split |= {name.replace("qkv_", f"{p}_"): part.contiguous() for p, part in pairs}
        elif "gate_up" in name:
            gate, up = tensor.chunk(2)
            split[name.replace("gate_up", "gate")] = gate.contiguous()
            split[name.replace("gate_up", "up")] = up.contiguous()
        else:
            split[name] = tensor
    fused = parameters_of(tmp_path / "phi3", tensors, config)
    llama = parameters_of(tmp_path / "llama", split, config)
    assert set(fused) == set(llama)
    assert all(torch.equal(fused[name], llama[name]) for name in fused)


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (
            lambda t: t.pop("model.layers.1.attention.wqkv.weight"),
            "missing tensor model.layers.1.attention.wqkv.weight",
        ),
        (
            lambda t: t.update({"model.layers.0.attention.wqkv.weight": torch.ones(30, 64)}),
            "wqkv.weight: 30 rows are not whole heads",
        ),
        (
            lambda t: t.update({"model.layers.2.attention.wqkv.weight": torch.ones(64, 64)}),
            r"model.layers.2.self_attn.qkv_proj.weight is \[64, 64\], expected \[128, 64\]",
        ),
        (
            lambda t: t.update({"model.layers.0.attention.wo.bias": torch.ones(64)}),
            "missing tensor model.layers.1.attention.wo.bias",
        ),
        (
            lambda t: t.update({"model.layers.0.attention.wx.bias": torch.ones(64)}),
            "unknown tensor model.layers.0.attention.wx.bias",
        ),
    ],
)
def test_what_does_not_fit_is_named(
    tmp_path: Path, edit: Callable[[dict[str, Tensor]], object], problem: str
) -> None:
    config = decoder_config("internlm2")
    tensors = hub_tensors(config, reference_decoder(config))
    edit(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=problem):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama", {"model_type": "gemma"}, "model_type must be 'qwen2_vl' or .*, got 'gemma'"),
        ("llama", {"head_dim": 15}, "head_dim must be even"),
        ("llama", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "type must be 'default' or"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1: whole heads"),
        ("phi3", {"sliding_window": 100}, r"sliding_window must be null: sliding windows \(100\)"),
        ("phi3-su", {"rope_scaling": {"type": "su", "short_factor": [1]}}, "list of 8 numbers"),
        ("internlm2", {"hidden_act": "gelu"}, "hidden_act must be 'silu'"),
        ("internlm2", {"bias": "no"}, "bias must be true or false"),
    ],
)
def test_configs_that_are_refused(
    tmp_path: Path, name: str, change: dict[str, Any], message: str
) -> None:
    write_decoder_folder(tmp_path, name)
    (tmp_path / "config.json").write_text(json.dumps(decoder_config(name, **change)))
    with pytest.raises(ConfigError, match=message):
        load_model(tmp_path)
