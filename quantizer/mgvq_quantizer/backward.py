"""The gradients of a loss at the matrices of the decoder, block after block (for `gradients`).

Forward, what enters each block is kept; backward, each block runs once more, with a graph of its
own, and hands on what reaches its inputs. So one block's graph is in memory at a time, and one
block's parameters where `residence` reads them on demand. The numbers are those of one backward
pass through the whole model. Not here: losses and what is made of gradients.

Source: method memo C.6; gradient checkpointing (arXiv 1604.06174).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mgvq_quantizer.batches import Features, TokenBatch, decoder_runs
from mgvq_quantizer.statistics import Calls, next_call, record_calls
from mgvq_quantizer.walk import answer_states, backwards
from mgvq_runtime.models.causal_lm import CausalLM

Losses = Callable[[Tensor], Sequence[Tensor]]
"""Scalars of the log-probabilities `[A, V]` of a batch's answer rows."""


@dataclass(frozen=True, eq=False)
class Sides:
    """What one batch brings to one matrix."""

    inputs: Tensor
    """`[T, I]`."""
    gradients: tuple[Tensor, ...]
    """`[T, O]` at its outputs, one a loss."""


def sides_of(
    model: CausalLM, names: Sequence[str], batch: TokenBatch, features: Features, losses: Losses
) -> dict[str, Sides]:
    """Run a batch forward and, for every loss, backward.

    Args:
        model: in dense arithmetic; not changed.
        names: linear layers of the decoder's blocks.
        batch: samples.
        features: rows of every picture.
        losses: called once, with log-probabilities that have a graph.

    Returns:
        Inputs and gradients by name of the matrix.
    """
    *calls, end = _enterings(model, batch, features)
    arriving = _at_the_end(model, end, batch, losses)
    found: dict[str, Sides] = {}
    for i, block in backwards(model.model.layers):
        if len(found) == len(names):
            break
        prefix = f"model.layers.{i}."
        mine = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
        sides, arriving = _through(block, mine, calls.pop(), arriving)
        found |= {prefix + name: side for name, side in sides.items()}
    return found


@torch.no_grad()
def _enterings(model: CausalLM, batch: TokenBatch, features: Features) -> Calls:
    """Return what enters each block, and what would enter one more."""
    layers = model.model.layers
    calls = record_calls(layers[0], decoder_runs(model, [batch], features))
    for block in layers:
        calls.append(next_call(calls[-1], block(*calls[-1])))
    return calls


def _at_the_end(
    model: CausalLM, end: tuple[Tensor, ...], batch: TokenBatch, losses: Losses
) -> list[tuple[Tensor, ...]]:
    """Return the gradients at the last block's outputs, a tuple a loss."""
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in end[:2]]
        states = answer_states(model, leaves[0], leaves[1], batch.answer_rows)
        found = losses(model.logits(states).log_softmax(-1))
        return [torch.autograd.grad(loss, leaves, retain_graph=True) for loss in found]


def _through(
    block: nn.Module,
    names: Sequence[str],
    call: tuple[Tensor | None, ...],
    arriving: Sequence[tuple[Tensor, ...]],
) -> tuple[dict[str, Sides], list[tuple[Tensor, ...]]]:
    """Run a block again; return what reaches its matrices and its inputs."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    with ExitStack() as stack, torch.enable_grad():
        for name in names:
            hook = _keeper(inputs, outputs, name)
            stack.callback(block.get_submodule(name).register_forward_hook(hook).remove)
        state = [None if x is None else x.detach().requires_grad_() for x in call[:2]]
        left = block(*state, *call[2:])
        leaves = [x for x in state if x is not None]
        wanted = [*(outputs[name] for name in names), *leaves]
        reached = [
            torch.autograd.grad(left, wanted, gradient, retain_graph=True) for gradient in arriving
        ]
    sides = {
        name: Sides(inputs[name], tuple(gradients[i] for gradients in reached))
        for i, name in enumerate(names)
    }
    return sides, [gradients[len(names) :] for gradients in reached]


def _keeper(
    inputs: dict[str, Tensor], outputs: dict[str, Tensor], name: str
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def keep(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        inputs[name], outputs[name] = args[0].detach(), output

    return keep
