"""Triton kernels, one op a file. In: packed tensors on a GPU. Out: a tensor.

Simple and correct first: gather a codebook, accumulate in float32. Only `mgvq_kernels.ops` calls
in here, and only when triton and a GPU are present; nothing is compiled at import.
"""

__all__: list[str] = []
