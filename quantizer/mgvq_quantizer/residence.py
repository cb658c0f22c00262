"""Where a dense model's parameters are: all in memory, or a block's only while it is used.

Called by `pipeline`. Blocks hold nearly all of a large model. In a run by block their parameters
are on the meta device; a loop over the tower's or the decoder's blocks reads each one from the
shards for as long as it looks at it; its vectors, norms and biases, are few and stay after that,
with what was done to them. Nothing else knows: what runs the model loops over its blocks.
Once matrices are quantized, a block comes back with its finished matrices decoded and the rest as
float16 stores it, so that a run by block sees the numbers a resident one sees, bit for bit.
Not here: token table, head, norms, patch embedding and merger, which stay.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mgvq_kernels import ops
from mgvq_quantizer.solver import Solution
from mgvq_runtime.checkpoint.reader import Checkpoint
from mgvq_runtime.errors import CheckpointError
from mgvq_runtime.models.causal_lm import CausalLM
from mgvq_runtime.models.loading import fill_model

BLOCKS = ("visual.blocks", "model.layers")


class _Blocks(nn.ModuleList):
    """A list whose loops hold each block while they look at it."""

    def __init__(
        self,
        blocks: Iterable[nn.Module],
        hold: Callable[[nn.Module], AbstractContextManager[None]],
    ) -> None:
        super().__init__(blocks)
        self._hold = hold

    def __iter__(self) -> Iterator[nn.Module]:
        for block in self._modules.values():
            assert block is not None
            with self._hold(block):
                yield block

    def __getitem__(self, index: int | slice) -> Any:
        """Return a list that holds its blocks in the same way, or a block that is not held."""
        if isinstance(index, slice):
            return _Blocks(list(self._modules.values())[index], self._hold)
        return super().__getitem__(index)


class Residence:
    """A dense model of float32, and the place its blocks come from."""

    def __init__(self, source: Checkpoint, device: torch.device | str, by_block: bool) -> None:
        """Make the graph and fill it, the blocks only where they are to stay.

        Args:
            source: an unquantized checkpoint; its files must stay as they are.
            device: where to compute.
            by_block: whether a block's parameters are read each time a loop comes to it.

        Raises:
            CheckpointError: if the checkpoint does not fit its config.json.
            ConfigError: if config.json cannot be understood.
        """
        self._source, self._device, self.by_block = source, device, by_block
        self._matrices: frozenset[str] | None = None
        self._solutions: Mapping[str, Solution] = {}
        self._names: dict[nn.Module, str] = {}
        self._holders: Counter[nn.Module] = Counter()
        left_out = tuple(f"{prefix}." for prefix in BLOCKS) if by_block else ()
        self.model: CausalLM = fill_model(source, device, left_out=left_out)
        if by_block:
            self.model.model.layers = self._on_demand("model.layers", self.model.model.layers)
            if self.model.visual is not None:
                blocks = self.model.visual.blocks
                self.model.visual.blocks = self._on_demand("visual.blocks", blocks)

    def settle(self, matrices: Iterable[str], solutions: Mapping[str, Solution]) -> None:
        """Round what stays dense to float16; from now on finished matrices come decoded.

        Args:
            matrices: names of those that are to be quantized; they keep their values till then.
            solutions: finished ones by name, looked at whenever a block is read.
        """
        self._matrices, self._solutions = frozenset(matrices), solutions
        for name, parameter in self.model.named_parameters():
            if not parameter.is_meta and self._stays_dense(name):
                parameter.copy_(parameter.half())

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every parameter that stays dense by name, one at a time."""
        for name, parameter in self.model.named_parameters():
            if self._stays_dense(name):
                yield name, self._now(name) if parameter.is_meta else parameter.detach()

    def _on_demand(self, prefix: str, blocks: nn.ModuleList) -> _Blocks:
        self._names |= {block: f"{prefix}.{i}" for i, block in enumerate(blocks)}
        return _Blocks(blocks, self._hold)

    @contextmanager
    def _hold(self, block: nn.Module) -> Iterator[None]:
        """Have a block's parameters in memory; loops within loops share them."""
        if not self._holders[block]:
            self._fetch(block)
        self._holders[block] += 1
        try:
            yield
        finally:
            self._holders[block] -= 1
            if not self._holders[block]:
                self._let_go(block)

    def _fetch(self, block: nn.Module) -> None:
        for name, parameter in list(block.named_parameters()):
            if parameter.is_meta:
                _put(block, name, self._now(f"{self._names[block]}.{name}"))

    def _let_go(self, block: nn.Module) -> None:
        for name, parameter in list(block.named_parameters()):
            if parameter.dim() > 1:
                _put(block, name, torch.empty_like(parameter, device="meta"))

    def _now(self, name: str) -> Tensor:
        """Read one parameter and give it the value it has by now."""
        solution = self._solutions.get(name.removesuffix(".weight"))
        if solution is not None and name.endswith(".weight"):
            return ops.vq_dequantize(solution.weight.to(self._device))
        value = self._source.tensor(name).to(self._device, torch.float32)
        if not bool(torch.isfinite(value).all()):
            raise CheckpointError(f"{name} holds values that are not finite")
        return value.half().float() if self._stays_dense(name) else value

    def _stays_dense(self, name: str) -> bool:
        """Whether a parameter is settled and not the weight of a matrix to be quantized."""
        if self._matrices is None:
            return False
        return name.rpartition(".")[0] not in self._matrices or not name.endswith(".weight")


def every_parameter(graph: CausalLM) -> Iterator[tuple[str, Tensor]]:
    """Yield all parameters by name, wherever they are: those of blocks in loops over the blocks."""
    prefixes = BLOCKS if graph.visual is not None else BLOCKS[1:]
    for prefix in prefixes:
        blocks = graph.get_submodule(prefix)
        assert isinstance(blocks, nn.ModuleList)
        for i, block in enumerate(blocks):
            yield from block.named_parameters(f"{prefix}.{i}")
    for name, parameter in graph.named_parameters():
        if not name.startswith(tuple(f"{prefix}." for prefix in prefixes)):
            yield name, parameter


def _put(block: nn.Module, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(block.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
