"""Other people's kernels on the same matrices, in the same run, by the same clock.

Called by the worker. A peer that is not installed says so and is no error; one that is installed
and breaks is. What each multiplies by is random: times do not depend on values.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_suite.place import Call, Place
from benchmarks.gpu_suite.shapes import MODELS, ROWS, Linear
from benchmarks.gpu_suite.steps import Row, Step
from benchmarks.gpu_suite.time_steps import linear_row


class AbsentError(Exception):
    """A peer cannot be run here, and why."""


Multiply = Callable[[Tensor], object]
Make = Callable[[Linear, torch.device], Multiply]
"""Makes one set of random weights and returns what multiplies rows by them."""


def wanted(module: str) -> Any:
    """Import a peer's module.

    Raises:
        AbsentError: if it is not installed or does not load here.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:
        raise AbsentError(f"cannot import {module}: {error}") from error


def bf16(linear: Linear, device: torch.device) -> Multiply:
    """cuBLAS through torch: the dense matrix every quantizer competes with."""
    weight = torch.randn(
        linear.out_features, linear.in_features, dtype=torch.bfloat16, device=device
    )
    return lambda x: F.linear(x, weight)


def tinygemm_int4(linear: Linear, device: torch.device) -> Multiply:
    """torch's own 4-bit product, groups of 128."""
    nibbles = torch.randint(
        0, 256, (linear.out_features, linear.in_features // 2), dtype=torch.uint8, device=device
    )
    packed = torch.ops.aten._convert_weight_to_int4pack(nibbles, 8)
    scales = torch.rand(
        linear.in_features // 128, linear.out_features, 2, dtype=torch.bfloat16, device=device
    )
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, 128, scales)


def gemlite_w2(linear: Linear, device: torch.device) -> Multiply:
    """GemLite's 2-bit scalar weights, groups of 128, in Triton."""
    helper = wanted("gemlite.helper")
    shape = (linear.out_features, linear.in_features // 128)
    layer = helper.A16W2_HQQ_INT(device=str(device), dtype=torch.float16).from_weights(
        torch.randint(
            0, 4, (linear.out_features, linear.in_features), dtype=torch.uint8, device=device
        ),
        torch.rand(shape, dtype=torch.float16, device=device),
        torch.rand(shape, dtype=torch.float16, device=device),
    )
    return layer


def aqlm_2x8(linear: Linear, device: torch.device) -> Multiply:
    """AQLM's two codebooks of 256 vectors of 8, in CUDA built at import."""
    kernel = wanted("aqlm.inference_kernels.cuda_kernel").CUDA_KERNEL
    groups = linear.in_features // 8
    codes = torch.randint(
        -128, 128, (linear.out_features, groups, 2), dtype=torch.int8, device=device
    )
    books = torch.randn(2, 256, 1, 8, dtype=torch.float16, device=device)
    scales = torch.ones(linear.out_features, 1, 1, 1, dtype=torch.float16, device=device)
    return lambda x: kernel.code2x8_matmat(x[None], codes, books, scales, None)


def codegemm_m1v4(linear: Linear, device: torch.device) -> Multiply:
    """CodeGEMM's one codebook of 256 vectors of 4, our 2-bit format; adds one row to its output."""
    kernel = wanted("codegemm_kernel")
    outputs, inputs = linear.out_features, linear.in_features
    codes = torch.randint(
        -(2**31), 2**31 - 1, (1, inputs // 16, outputs), dtype=torch.int32, device=device
    )
    scales = torch.ones(inputs // 128, outputs, dtype=torch.float16, device=device)
    book = torch.randn(1, 256, 4, dtype=torch.float16, device=device)
    y = torch.empty(1, 1, outputs, dtype=torch.float16, device=device)

    def multiply(x: Tensor) -> Tensor:
        y.zero_()
        kernel.codegemm_gemv(x.view(1, 1, inputs), y, codes, scales, book, 128)
        return y

    return multiply


PEERS: Mapping[str, tuple[Make, float, torch.dtype, tuple[int, ...]]] = {
    "bf16 F.linear": (bf16, 16, torch.bfloat16, ROWS),
    "torch int4 (tinygemm)": (tinygemm_int4, 4, torch.bfloat16, ROWS),
    "gemlite W2": (gemlite_w2, 2, torch.float16, ROWS[:5]),
    "AQLM 2x8": (aqlm_2x8, 2, torch.float16, ROWS[:5]),
    "CodeGEMM m1v4": (codegemm_m1v4, 2, torch.float16, ROWS[:1]),
}
"""By name: how it is made, bits a weight, dtype of x, row counts."""


def peer_steps(place: Place) -> list[Step]:
    """List a step a peer and model; the built-in ones and the first model matter most."""
    models = list(MODELS.items())
    return [
        Step(
            f"peer {name}, {model}",
            2 + i if name in ("bf16 F.linear", "torch int4 (tinygemm)") else 3 + i,
            20,
            functools.partial(peer_times, place, name, linears),
        )
        for name in PEERS
        for i, (model, linears) in enumerate(models if place.is_gpu else models[:1])
    ]


def peer_times(place: Place, name: str, linears: tuple[Linear, ...]) -> Iterator[Row]:
    """Time one peer on the matrices of a model, or say why it is absent."""
    make, bits, dtype, row_counts = PEERS[name]
    try:
        if not place.is_gpu:
            raise AbsentError("needs a GPU")
        for linear in linears:
            nbytes = int(linear.num_weights * bits / 8)
            made = [make(linear, place.device) for _ in range(place.clock.copies(nbytes))]
            for rows in row_counts:
                x = torch.randn(rows, linear.in_features, device=place.device).to(dtype)
                calls: list[Call] = [functools.partial(multiply, x) for multiply in made]
                yield linear_row(name, linear, bits, rows, nbytes, place.clock.time(calls))
    except AbsentError as error:
        yield {"kind": "absent", "variant": name, "absent": str(error)}
