"""What a packed weight's tensors must be before a kernel reads them (called by `layout.PackedVQ`).

The `*_order` files say which tensors an order has. Nothing is looked at but names, sizes, dtypes,
strides and addresses: codes and tables may hold anything.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Expected = Mapping[str, tuple[int, torch.dtype]]
"""How many numbers of which dtype, by a tensor's name."""

ALIGNMENT = 16
"""Bytes a thread of a GPU loads at once."""


def check_tensors(tensors: Mapping[str, Tensor], expected: Expected, is_aligned: bool) -> None:
    """Ask for contiguous tensors that hold what the layout says.

    Args:
        tensors: by name; others than the expected ones are not looked at.
        expected: what there must be.
        is_aligned: whether they must start where `ALIGNMENT` bytes can be loaded at a time.

    Raises:
        TypeError: if a tensor has another dtype.
        ValueError: if one is missing, has another size, is not contiguous or not aligned.
    """
    for name, (numbers, dtype) in expected.items():
        tensor = tensors.get(name)
        if tensor is None or tensor.numel() != numbers or not tensor.is_contiguous():
            came = None if tensor is None else (list(tensor.shape), list(tensor.stride()))
            raise ValueError(
                f"{name} must be contiguous and hold {numbers} numbers for this layout, got "
                f"{came} (shape, strides); make it with packing.pack"
            )
        if tensor.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")
        if is_aligned and tensor.data_ptr() % ALIGNMENT:
            raise ValueError(
                f"{name} must start at a multiple of {ALIGNMENT} bytes, got address "
                f"{tensor.data_ptr():#x}; clone it"
            )
