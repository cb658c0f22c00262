"""Layers of the graph: activations in, activations out; parameters and one kernel call each.

In: tensors and one `ForwardBatch`. Out: tensors. Start at `layers.attention.Attention`.
This room never reads a file and knows no model family. Called by `mgvq_runtime.models`; next room
down: `mgvq_kernels.ops`.
"""

__all__: list[str] = []
