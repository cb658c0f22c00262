"""Model families: a checkpoint folder in, a graph with filled weights out.

In: a folder. Out: a module that encodes images, embeds tokens and returns hidden states. Start at
`models.loading.load_model`; `models.registry` lists the families. This room never schedules,
samples or tokenizes. Called by `mgvq_runtime.engine` and `mgvq_quantizer`; next room down:
`mgvq_runtime.layers`.
"""

__all__: list[str] = []
