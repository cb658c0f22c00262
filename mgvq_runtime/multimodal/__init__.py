"""Pictures and messages in, a `Prompt` out: decoding, patches, placeholders, positions.

In: bytes of a picture, OpenAI-shaped messages. Out: `mgvq_runtime.request.Prompt`. Start at
`multimodal.chat.ChatProcessor.prepare`. This room never fetches a URL and never runs a model.
Called by `mgvq_runtime.engine` and `mgvq_quantizer`; beside it: `mgvq_runtime.tokenizer`.
"""

__all__: list[str] = []
