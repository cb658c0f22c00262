"""Text to token ids and back, chat templates included.

In: messages or text. Out: token ids; and, token by token, text again.
Start at `tokenizer.Tokenizer.encode_chat`. This room never trusts what a user wrote: only a
template's own text can become a special token. It knows no picture (`mgvq_runtime.multimodal`
expands placeholders) and no model. Beside it: `mgvq_runtime.checkpoint.files`, which reads JSON.
"""

from mgvq_runtime.tokenizer.detokenizer import IncrementalDetokenizer
from mgvq_runtime.tokenizer.tokenizer import Tokenizer

__all__ = ["IncrementalDetokenizer", "Tokenizer"]
