"""Trains mgvq-tiny-vl from nothing (run by hand; `README.md` has the commands).

Two worker processes of one thread each share the weights in memory: each draws and runs its own
micro-batch in bfloat16, then steps its share of the float32 weights (`optimizer`). One worker
alone does the same steps, only slower. State is saved every few minutes; a run continues with
`--resume`. On a GPU one worker runs both micro-batches there.
Not here: the batches (`conversations`), the graph (`model`), what is minimised (`losses`).
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, multiprocessing
from tqdm import tqdm

from benchmarks.tiny_vlm import assets as assets_module
from benchmarks.tiny_vlm.conversations import Batch, Encoder, make_batch
from benchmarks.tiny_vlm.drawing import choose_size
from benchmarks.tiny_vlm.export import load_checkpoint, save_checkpoint
from benchmarks.tiny_vlm.losses import (
    answer_loss,
    dense_loss,
    dense_words,
    training_model,
    word_loss,
)
from benchmarks.tiny_vlm.model import DecoderLayer, TinyVLM, VisionBlock
from benchmarks.tiny_vlm.optimizer import adam_step, make_slots, muon_step, share_of
from benchmarks.tiny_vlm.recipe import CONTINUED, Recipe
from benchmarks.tiny_vlm.scoring import encode, tally, watch_set
from benchmarks.tiny_vlm.whitening import whiten_patch_embedding

HARMLESS_ON_RESUME = {
    "steps",
    "decay_share",
    "levels",
    "tower_steps",
    "pictures",
    "word_weight",
}
"""Recipe fields that a resumed run may change, as long as the rate has not begun to fall."""


@dataclass
class Shared:
    """Flat tensors that all workers see, parameter after parameter."""

    master: Tensor
    """`[n]` float32 weights."""
    moment1: Tensor
    """AdamW's first moment, or Muon's momentum."""
    moment2: Tensor
    gradients: Tensor
    """`[micro_batches, n]` in the graph's dtype."""
    weights: Tensor
    """`[n]` copy of `master` that the graph uses, in its dtype."""
    scratch: Tensor
    """`[workers]` float64: a worker's part of the squared gradient norm."""


def graph_dtype(device: torch.device) -> torch.dtype:
    """Bfloat16 where the device multiplies it natively, else float32.

    On a processor without such instructions bfloat16 is emulated: 4 against 54 GFLOP/s in float32
    on a core that knows AVX2 only.
    """
    has_bfloat16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if device.type == "cuda" or has_bfloat16 else torch.float32


def allocate(model: TinyVLM, recipe: Recipe, workers: int, dtype: torch.dtype) -> Shared:
    """Shared tensors holding the model's present weights, for a graph of some dtype."""
    master = torch.cat([p.detach().flatten() for p in model.parameters()])
    tensors = Shared(
        master=master,
        moment1=torch.zeros_like(master),
        moment2=torch.zeros_like(master),
        gradients=torch.zeros(recipe.micro_batches, len(master), dtype=dtype),
        weights=master.to(dtype, copy=True),
        scratch=torch.zeros(workers, dtype=torch.float64),
    )
    for tensor in vars(tensors).values():
        tensor.share_memory_()
    return tensors


def adopt(model: TinyVLM, flat: Tensor, gradient: Tensor | None) -> None:
    """Make the parameters (and their gradients) views of flat tensors."""
    offset = 0
    for parameter in model.parameters():
        size = parameter.numel()
        view = flat[offset : offset + size].view(parameter.shape)
        parameter.data = view
        if gradient is not None:
            parameter.grad = gradient[offset : offset + size].view(parameter.shape)
        offset += size


def flat_to_state(model: TinyVLM, flat: Tensor) -> dict[str, Tensor]:
    """Named tensors of a flat vector."""
    state, offset = {}, 0
    for name, parameter in model.named_parameters():
        state[name] = flat[offset : offset + parameter.numel()].view(parameter.shape)
        offset += parameter.numel()
    return state


@dataclass
class Worker:
    """One process of the run."""

    rank: int
    workers: int
    recipe: Recipe
    shared: Shared
    barrier: Any
    arguments: argparse.Namespace

    def prepare(self) -> Tensor:
        """Load what a worker needs; return the flat weights that its graph uses."""
        torch.set_num_threads(1)
        cache = self.arguments.cache
        self.encoder = Encoder(self.arguments.processor)
        self.assets = assets_module.load(cache, "train")
        self.model = training_model()
        self.parts: dict[str, float] = {}
        self.words = dense_words(self.encoder)
        self.device = torch.device(self.arguments.device)
        if self.arguments.compile:
            torch._dynamo.config.recompile_limit = 32  # three kinds of block, with and without grad
            VisionBlock.forward = torch.compile(VisionBlock.forward, dynamic=True)
            DecoderLayer.forward = torch.compile(DecoderLayer.forward, dynamic=True)
        weights = self.shared.weights.to(self.device)
        self.gradient = torch.zeros_like(weights)
        self.model.to(self.device)
        adopt(self.model, weights, self.gradient)
        self.slots = share_of(make_slots(self.model), self.rank, self.workers)
        unseen = assets_module.load(cache, "test")
        self.watch = watch_set(unseen, self.encoder, 16, 24)[self.rank :: self.workers]
        self.started = self.saved = time.time()
        return weights

    def run(self, first_step: int) -> None:
        """Train from `first_step` to the end of the recipe."""
        weights = self.prepare()
        progress = tqdm(
            range(first_step, self.recipe.steps),
            initial=first_step,
            total=self.recipe.steps,
            unit="step",
            disable=self.rank > 0,
            mininterval=10,
        )
        parent = multiprocessing.parent_process()
        for step in progress:
            if parent is not None and not parent.is_alive():
                self.barrier.abort()  # nobody waits for this run any more
                return
            loss = self.step(step)
            if self.device.type != "cpu":
                weights.copy_(self.shared.weights)
            if self.rank == 0 and step % 25 == 0:
                progress.set_postfix(loss=f"{loss:.3f}", refresh=False)
                self.log(
                    {
                        "step": step,
                        "loss": round(loss, 4),
                        **self.parts,
                        "s": round(time.time() - self.started),
                    }
                )
            if step % 50 == 0:
                return_free_memory()
            if (step + 1) % self.arguments.watch_every == 0 or step + 1 == self.recipe.steps:
                self.report(step + 1)
            if self.rank == 0 and time.time() - self.saved > self.arguments.save_every_s:
                self.save(step + 1)
        if self.rank == 0:
            self.save(self.recipe.steps)

    def step(self, step: int) -> float:
        """One optimizer step; returns the mean loss of this worker's micro-batches."""
        recipe, shared = self.recipe, self.shared
        losses = []
        for micro in range(self.rank, recipe.micro_batches, self.workers):
            rng = Random(f"{recipe.seed}/{step}/{micro}")
            size = choose_size(rng)
            rows, pictures = recipe.amounts(step, size)
            batch = make_batch(
                rng,
                self.assets,
                self.encoder,
                size,
                rows,
                recipe.questions,
                recipe.conversation_share,
                pictures,
            )
            self.gradient.zero_()
            losses.append(self.backward(batch))
            shared.gradients[micro].copy_(self.gradient)
        self.barrier.wait()
        self.update(step)
        self.barrier.wait()
        return sum(losses) / len(losses)

    def backward(self, batch: Batch) -> float:
        """Add the gradient of one micro-batch; return the loss of its answers."""
        recipe = self.recipe
        features = encode(self.model, batch)
        parts = {}
        total = features.new_zeros(())
        if len(batch.tokens):
            parts["answer"], parts["look"] = answer_loss(self.model, batch, self.encoder, features)
            total = parts["answer"] + recipe.look_weight * parts["look"]
        if (batch.dense_classes > 0).any():
            parts["dense"] = dense_loss(self.model, batch, features)
            parts["word"] = word_loss(self.model, batch, features, self.words)
            total = total + recipe.dense_weight * parts["dense"]
            total = total + recipe.word_weight * parts["word"]
        if total.requires_grad:
            total.backward()
        self.parts |= {name: round(float(part.detach()), 3) for name, part in parts.items()}
        return float(parts["answer"].detach()) if "answer" in parts else 0.0

    def update(self, step: int) -> None:
        """Step this worker's parameters by the mean gradient."""
        recipe, shared = self.recipe, self.shared
        gradients = [
            shared.gradients[:, slot.start : slot.end].float().sum(0) / recipe.micro_batches
            for slot in self.slots
        ]
        shared.scratch[self.rank] = sum(float(g.pow(2).sum()) for g in gradients)
        self.barrier.wait()
        norm = math.sqrt(float(shared.scratch.sum()))
        clip = min(1.0, recipe.clip_norm / (norm + 1e-6))
        adam_rate, muon_rate = recipe.rates(step)
        for slot, gradient in zip(self.slots, gradients, strict=True):
            if not gradient.any():
                continue  # the decoder, as long as the tower learns alone
            gradient.mul_(clip)
            weight, m, v = (
                flat[slot.start : slot.end]
                for flat in (shared.master, shared.moment1, shared.moment2)
            )
            if slot.is_muon:
                dtype = shared.weights.dtype
                muon_step(weight, gradient, m, slot, recipe, muon_rate, dtype)
            else:
                has_decay = len(slot.shape) > 1
                adam_step(weight, gradient, (m, v), recipe, adam_rate, step, has_decay)
            shared.weights[slot.start : slot.end].copy_(weight)

    def report(self, step: int) -> None:
        """Accuracy by kind on unseen pictures, into the log (each worker its share)."""
        counts = tally(self.model, self.watch, self.encoder)
        self.log(
            {"step": step, "watch": {k: list(v) for k, v in counts.items()}, "rank": self.rank}
        )
        self.barrier.wait()

    def log(self, entry: dict[str, object]) -> None:
        """Append one JSON line."""
        with (self.arguments.state / "log.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def save(self, step: int) -> None:
        """Write the resume state and a usable checkpoint, atomically."""
        shared, folder = self.shared, self.arguments.state
        tensors = {name: getattr(shared, name) for name in ("master", "moment1", "moment2")}
        partial = folder / "state.partial"
        facts = {"step": str(step), "recipe": json.dumps(asdict(self.recipe))}
        save_file(tensors, partial, metadata=facts)
        os.replace(partial, folder / "state.safetensors")
        state = flat_to_state(self.model, shared.master)
        state = {name: t for name, t in state.items() if not name.startswith("dense.")}
        save_checkpoint(state, self.model.config, self.arguments.processor, folder / "checkpoint")
        self.saved = time.time()


def resume(shared: Shared, recipe: Recipe, path: Path) -> int:
    """Load a saved state; return the step to go on with.

    Raises:
        ValueError: the recipe differs in a field that would change what was done already.
    """
    with safe_open(path, framework="pt") as file:
        facts = file.metadata()
        old = json.loads(facts["recipe"])
        changed = {
            k for k, v in json.loads(json.dumps(asdict(recipe))).items() if old.get(k) != v
        } - HARMLESS_ON_RESUME
        if changed:
            raise ValueError(f"{path} was made with other values of {sorted(changed)}")
        for name in ("master", "moment1", "moment2"):
            saved = file.get_tensor(name)
            getattr(shared, name)[: len(saved)].copy_(saved)
    shared.weights.copy_(shared.master)
    return int(facts["step"])


def return_free_memory() -> None:
    """Give freed pages back: batches of many shapes fragment glibc's heap by gigabytes."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return  # another C library


def _worker(rank: int, worker_arguments: tuple[Any, ...]) -> None:
    workers, recipe, shared, barrier, arguments, first_step = worker_arguments
    Worker(rank, workers, recipe, shared, barrier, arguments).run(first_step)


def parse_arguments() -> argparse.Namespace:
    """Command line; the recipe's own constants are in `recipe`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--state", type=Path, required=True, help="folder for state, log, checkpoint"
    )
    parser.add_argument("--processor", type=Path, default=Path("benchmarks/tiny_vlm/dense"))
    parser.add_argument("--cache", type=Path, default=assets_module.DEFAULT_CACHE)
    parser.add_argument("--steps", type=int, help="optimizer steps in all (default: the recipe's)")
    parser.add_argument("--workers", type=int, default=2, help="processes; 1 or 2")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (then with --workers 1)")
    parser.add_argument("--resume", action="store_true", help="go on from the saved state")
    parser.add_argument("--init", type=Path, help="checkpoint to start from, by another recipe")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--watch-every", type=int, default=400, help="steps between watch reports")
    parser.add_argument("--save-every-s", type=float, default=180, help="seconds between saves")
    return parser.parse_args()


def main() -> None:
    """Start the workers."""
    arguments = parse_arguments()
    torch.set_num_threads(1)
    arguments.state.mkdir(parents=True, exist_ok=True)
    recipe = Recipe() if arguments.init is None else CONTINUED
    recipe = replace(recipe, steps=arguments.steps or recipe.steps)
    assets_module.build(arguments.cache)
    model = training_model()
    model.initialise(recipe.seed)
    if arguments.init is None:
        whiten_patch_embedding(model, assets_module.load(arguments.cache, "train"), recipe.seed)
    else:
        model.load_state_dict(load_checkpoint(arguments.init).state_dict(), strict=False)
    dtype = graph_dtype(torch.device(arguments.device))
    shared = allocate(model, recipe, arguments.workers, dtype)
    first_step = 0
    if arguments.resume:
        first_step = resume(shared, recipe, arguments.state / "state.safetensors")
    barrier = multiprocessing.get_context("spawn").Barrier(arguments.workers)
    common = (arguments.workers, recipe, shared, barrier, arguments, first_step)
    multiprocessing.spawn(_worker, args=(common,), nprocs=arguments.workers)


if __name__ == "__main__":
    main()
