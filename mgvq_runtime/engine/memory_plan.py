"""Who gets which bytes, before anything is served (called by `engine.startup` and `inspect`).

What is there, less weights, the worst moment of a forward, encoded pictures and a headroom, is the
key/value pool. Arithmetic only, the same for every device: where the numbers come from - estimated
from shapes, or measured on a GPU - is `startup`'s business. Too little memory is refused here, with
the flags that would help.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from mgvq_runtime.config import (
    MAX_AUTO_KV_CACHE_BYTES_CPU,
    EngineConfig,
    ModelFacts,
    kv_block_bytes,
    resolve_kv_cache_dtype,
    resolve_model_len,
)
from mgvq_runtime.errors import ConfigError

MIN_CUDA_HEADROOM_BYTES = 256 << 20
HEADROOM_SHARE = 20
"""One part in so many stays free."""
MIN_TEXT_TOKENS = 64
"""A request must have room for the largest picture and so many tokens of text, at the least."""


@dataclass(frozen=True)
class MemoryDemand:
    """Bytes that are there and bytes that others than the key/value pool take."""

    available_bytes: int
    """Free before the weights are loaded."""
    weights_bytes: int
    vision_bytes: int
    """The most alive while pictures are encoded; 0 for a model of text alone."""
    prefill_bytes: int
    """The most alive while a chunk of a prompt is read."""
    max_image_tokens: int
    """Of the largest picture; 0 for a model of text alone."""
    is_measured: bool
    """Whether the worst case was run, or estimated from shapes."""
    rows_bytes: int = 0
    """Encoded pictures or a video, while the prompt they are in is read."""
    graphs_bytes: int = 0
    """Recorded decode steps."""
    table_bytes: int = 0
    """The part of the weights that can lie in main memory: a token table."""


@dataclass(frozen=True)
class MemoryPlan:
    """What every byte is for."""

    device: str
    available_bytes: int
    weights_bytes: int
    """Those on the device."""
    host_bytes: int
    """A token table in main memory; none of the device's bytes."""
    vision_bytes: int
    prefill_bytes: int
    rows_bytes: int
    graphs_bytes: int
    image_cache_bytes: int
    headroom_bytes: int
    kv_cache_dtype: str
    kv_block_bytes: int
    num_kv_blocks: int
    block_size: int
    max_model_len: int
    """Most tokens of one request; not more than the pool holds."""
    max_image_tokens: int
    is_measured: bool

    @property
    def kv_cache_bytes(self) -> int:
        """Size of the key/value pool."""
        return self.num_kv_blocks * self.kv_block_bytes

    @property
    def planned_bytes(self) -> int:
        """The most the engine is expected to hold at once, without the headroom."""
        forward = max(self.vision_bytes, self.prefill_bytes)
        held = self.rows_bytes + self.graphs_bytes + self.image_cache_bytes + self.kv_cache_bytes
        return self.weights_bytes + forward + held

    def as_json(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        sums = {"kv_cache_bytes": self.kv_cache_bytes, "planned_bytes": self.planned_bytes}
        return {**asdict(self), **sums}

    def lines(self) -> Iterator[str]:
        """Yield the plan as a table."""
        how = "measured" if self.is_measured else "estimated"
        tokens = max(self.num_kv_blocks - 1, 0) * self.block_size
        share = (
            ""
            if not tokens
            else f", {tokens / self.max_model_len:.1f} requests of {self.max_model_len:,}"
        )
        yield f"memory on {self.device:<16}{_mib(self.available_bytes)}  available"
        yield f"  weights                 {_mib(self.weights_bytes)}"
        if self.host_bytes:
            yield f"  (token table            {_mib(self.host_bytes)}  in main memory)"
        yield f"  encoding pictures       {_mib(self.vision_bytes)}  {how}, not at the same time as"
        yield f"  reading prompts         {_mib(self.prefill_bytes)}  {how}"
        yield f"  pictures being read     {_mib(self.rows_bytes)}  or a video, encoded"
        yield f"  decode graphs           {_mib(self.graphs_bytes)}  {how}"
        yield f"  encoded pictures        {_mib(self.image_cache_bytes)}  kept for reuse"
        pool = f"{self.kv_cache_dtype}, {tokens:,} tokens{share}"
        yield f"  keys and values         {_mib(self.kv_cache_bytes)}  {pool}"
        yield f"  planned                 {_mib(self.planned_bytes)}"
        yield f"  headroom                {_mib(self.headroom_bytes)}"


def plan_memory(
    config: EngineConfig, facts: ModelFacts, device: str, dtype: str, demand: MemoryDemand
) -> MemoryPlan:
    """Divide the memory of a device.

    Args:
        config: What the user said; `gpu_memory_limit` caps what is there on any device.
        facts: Shapes of the model.
        device: "cpu" or "cuda:N".
        dtype: Of activations.
        demand: What is there and what is taken.

    Raises:
        ConfigError: if a single request would not fit; the message names the flags that help.
    """
    plan, most = _divide(config, facts, device, dtype, demand, config.embedding_device == "host")
    if config.embedding_device == "auto" and plan.num_kv_blocks < most and demand.table_bytes:
        plan, most = _divide(config, facts, device, dtype, demand, table_on_host=True)
    max_model_len = resolve_model_len(config, facts)
    least = min(max_model_len, demand.max_image_tokens + MIN_TEXT_TOKENS)
    needed = config.max_model_len or least
    if plan.max_model_len < needed:
        can_move = bool(demand.table_bytes) and not plan.host_bytes
        raise ConfigError(_refusal(config, plan, needed, plan.num_kv_blocks == most, can_move))
    return plan


def _divide(
    config: EngineConfig,
    facts: ModelFacts,
    device: str,
    dtype: str,
    demand: MemoryDemand,
    table_on_host: bool,
) -> tuple[MemoryPlan, int]:
    """Return a plan, however little it leaves, and the most blocks that the pool may have."""
    limit = config.gpu_memory_limit or demand.available_bytes
    available = min(demand.available_bytes, limit)
    is_cpu = device == "cpu"
    headroom = available // HEADROOM_SHARE
    headroom = headroom if is_cpu else max(headroom, MIN_CUDA_HEADROOM_BYTES)
    # On a CPU prepared patches lie in the same memory as encoded pictures.
    image_cache = config.image_cache_bytes * (2 if is_cpu else 1) if demand.max_image_tokens else 0
    kv_cache_dtype = resolve_kv_cache_dtype(config.kv_cache_dtype, dtype)
    host = demand.table_bytes if table_on_host else 0
    max_model_len = resolve_model_len(config, facts)
    plan = MemoryPlan(
        device=device,
        available_bytes=available,
        weights_bytes=demand.weights_bytes - host,
        host_bytes=host,
        vision_bytes=demand.vision_bytes,
        prefill_bytes=demand.prefill_bytes,
        rows_bytes=demand.rows_bytes,
        graphs_bytes=demand.graphs_bytes,
        image_cache_bytes=image_cache,
        headroom_bytes=headroom,
        kv_cache_dtype=kv_cache_dtype,
        kv_block_bytes=kv_block_bytes(facts, config.block_size, kv_cache_dtype),
        num_kv_blocks=0,
        block_size=config.block_size,
        max_model_len=max_model_len,
        max_image_tokens=demand.max_image_tokens,
        is_measured=demand.is_measured,
    )
    wanted = config.max_num_seqs * -(-max_model_len // config.block_size) + 1
    cap = config.kv_cache_bytes or (MAX_AUTO_KV_CACHE_BYTES_CPU if is_cpu else None)
    most = wanted if cap is None else min(wanted, cap // plan.kv_block_bytes)
    left = available - headroom - plan.planned_bytes
    num_blocks = max(min(most, left // plan.kv_block_bytes), 0)
    max_model_len = min(max_model_len, max(num_blocks - 1, 0) * config.block_size)
    return replace(plan, num_kv_blocks=num_blocks, max_model_len=max_model_len), most


def _refusal(
    config: EngineConfig, plan: MemoryPlan, needed: int, is_capped: bool, can_move_table: bool
) -> str:
    """Say what is missing and which flags give it."""
    flags = [f"--max-model-len (now {needed})"] if config.max_model_len else []
    if plan.rows_bytes and not flags and not is_capped:
        flags.append("--max-model-len (a video may fill it)")
    if plan.max_image_tokens:
        flags.append(f"--max-image-tokens (a picture has up to {plan.max_image_tokens})")
    if not is_capped:
        if plan.prefill_bytes >= plan.vision_bytes:
            flags.append(f"--max-batch-tokens (now {config.max_batch_tokens})")
        else:
            flags.append(f"--max-batch-patches (now {config.max_batch_patches})")
        if plan.image_cache_bytes:
            flags.append(f"--image-cache-bytes (now {config.image_cache_bytes})")
    raised = "--kv-cache-bytes" if is_capped else "--gpu-memory-limit"
    needed_bytes = (-(-needed // plan.block_size) + 1) * plan.kv_block_bytes
    is_raisable = is_capped or config.gpu_memory_limit
    hint = f"; or raise {raised}" if is_raisable else "; or use a larger device"
    lower = ("lower " + ", ".join(flags)) if flags else "quantize to fewer bits"
    if can_move_table and not is_capped:
        hint += "; or put the token table in main memory with --embedding-device host"
    if plan.graphs_bytes and not is_capped:
        hint += f"; or save {plan.graphs_bytes} bytes of decode graphs with --enforce-eager"
    return "\n".join(
        [
            f"too little memory: one request of {needed} tokens needs {needed_bytes} bytes of keys "
            f"and values, {plan.kv_cache_bytes} are left. {lower}{hint}",
            *plan.lines(),
        ]
    )


def _mib(count: int) -> str:
    return f"{count / 2**20:>12,.1f} MiB"
