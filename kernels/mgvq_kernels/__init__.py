"""Arithmetic on vector-quantized weights. In: tensors. Out: a tensor.

Start at `ops.vq_linear`; `reference.py` is the specification of every op and `layout.py` the
vocabulary (bands, stages, packed weights). Never reads a file, never knows a model. Called by
`mgvq_runtime.layers`; stands on torch alone (numba and triton are optional, loaded on first use).
"""

__all__: list[str] = []
