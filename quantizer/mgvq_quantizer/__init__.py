"""The quantizer: a Hugging Face checkpoint folder in, an MGVQ checkpoint folder out.

Start at `pipeline.quantize`; `solver.solve` is one matrix, `tuning.tune` what follows them all, and
`evaluate.evaluate` compares a checkpoint with its reference. Knows the models and the format, never
the engine. Next room down: `mgvq_runtime`.
"""

__all__: list[str] = []
