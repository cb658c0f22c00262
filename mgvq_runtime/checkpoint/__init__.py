"""The checkpoint format: what a folder may say, and how it is read and written.

In: a folder. Out: named tensors and `VQWeight`s, every one of them checked; and the way back.
Start at `reader.open_checkpoint`; `spec.py` is the format, `docs/checkpoint_format.md` its page.
This room never builds a model, never packs for a kernel, never unpickles and never executes
anything. Called by `mgvq_runtime.models.loading` and by the quantizer. Next room down:
`mgvq_kernels.layout`, the vocabulary of bands and stages.
"""

__all__: list[str] = []
