"""A text-only Llama whose blocks are nearly all of it, in shards, and a quantizer run measured.

Called by `test_residence_memory`, and by hand with other shapes:
`python -m tests.quantizer.deep_llama FOLDER OUTPUT resident|stream` prints the bytes by which the
run raised the process's peak.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mgvq_quantizer.pipeline import quantize
from mgvq_quantizer.recipe import QuantRecipe
from mgvq_runtime.checkpoint import writer
from tests.quantizer.conftest import QUICK
from tests.runtime.conftest import write_json, write_tokenizer
from tests.runtime.models.decoders import decoder_config

ROWS = [
    {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]}
    for q, a in (
        ("How many red circles are there?", "three"),
        ("Describe it.", "one blue square"),
        ("And the dog?", "It is lazy"),
    )
]
RECIPE = {**QUICK, "codebook_iterations": 1, "descent_sweeps": 0, "tuning_steps": 0}


def write_deep_llama(folder: Path, layers: int, shape: dict[str, Any], dtype: torch.dtype) -> int:
    """Write a random model, a shard a block, and `rows.jsonl`; return its parameters."""
    folder.mkdir()
    write_tokenizer(folder)
    (folder / "preprocessor_config.json").unlink()
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    config = decoder_config("llama", vocab_size=512, num_hidden_layers=layers, **shape)
    write_json(folder / "config.json", config)
    D, width, Dh = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    rows, kv_rows = config["num_attention_heads"] * Dh, config["num_key_value_heads"] * Dh
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    count = 0

    def save(shapes: dict[str, tuple[int, ...]]) -> None:
        nonlocal count
        name = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        tensors: dict[str, Tensor] = {}
        for key, size in shapes.items():
            noise = torch.randn(size, generator=generator) * size[-1] ** -0.5
            tensors[key] = (noise if len(size) > 1 else torch.ones(size)).to(dtype)
            count += tensors[key].numel()
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))

    ends = {"model.embed_tokens.weight": (512, D), "lm_head.weight": (512, D)}
    save({**ends, "model.norm.weight": (D,)})
    for i in range(layers):
        block: dict[str, tuple[int, ...]] = {
            "input_layernorm": (D,),
            "post_attention_layernorm": (D,),
            "self_attn.q_proj": (rows, D),
            "self_attn.k_proj": (kv_rows, D),
            "self_attn.v_proj": (kv_rows, D),
            "self_attn.o_proj": (D, rows),
            "mlp.gate_proj": (width, D),
            "mlp.up_proj": (width, D),
            "mlp.down_proj": (D, width),
        }
        save({f"model.layers.{i}.{name}.weight": size for name, size in block.items()})
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    return count


def measure(folder: Path, output: Path, by_block: bool) -> int:
    """Quantize in this process; return by how many bytes its peak grew."""
    torch.set_num_threads(1)
    writer.SHARD_BYTES = 16_000_000  # else all of this small checkpoint is gathered in memory
    before = _peak()
    recipe = QuantRecipe(**RECIPE)  # type: ignore[arg-type]
    data = folder / "rows.jsonl"
    quantize(folder, output, recipe, data, show_progress=False, by_block=by_block)
    return _peak() - before


def _peak() -> int:
    """Return the most bytes this program held; `ru_maxrss` knows those of who started it too."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x)
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    print(measure(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "stream"))
