"""Compiling a form where it can do no harm (called by `engine.grammar` before its own compiling).

llguidance bounds most of its work, not all: `/.*a.{20}.*/ & ~/.*c.{18}.*/` takes ever more memory
and never ends, and a thread cannot be stopped. So a process of its own, this file run as a script,
compiles a new form first, within limits of time and memory. Whether the form is right is not said
here: only the words of the model's vocabulary are missing, and compiling does not depend on them.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import threading
from collections.abc import Collection, Mapping

STACK_BYTES = 256 << 20
"""llguidance follows chains of rules and `$ref`s by recursion: on the usual stack of 8 MiB a chain
of 3,000 to 4,000 ends the process; one of 17,576 rules takes between 32 and 64 MiB, and the longest
text allowed has room for twice as many (llguidance 1.9.1, x86-64)."""
CPU_S = 5
"""Many times what the largest form takes that llguidance finishes: 0.9 s, `(a{1000}){1000}`."""
WALL_S = 30  # where other work leaves the process no CPU
MEMORY_BYTES = 768 << 20  # the same form takes 0.2 GB; the stack above counts in full


def is_harmless(
    text: str,
    vocab_size: int,
    special_tokens: Mapping[int, bytes],
    eos_token_ids: Collection[int],
) -> bool:
    """Return whether a form in llguidance's own language compiles within the limits.

    A form that is refused for a fault is harmless. Takes about 0.1 s.

    Args:
        text: The form.
        vocab_size: Width of the model's logits.
        special_tokens: Tokens that a grammar may name, as `<|im_end|>`.
        eos_token_ids: Tokens that end an answer.

    Raises:
        RuntimeError: if the process fails for another reason than the form.
    """
    task = {
        "path": sys.path,
        "limits": [CPU_S, MEMORY_BYTES],
        "text": text,
        "vocab_size": vocab_size,
        "special": [[i, word.decode("latin-1")] for i, word in special_tokens.items()],
        "eos": sorted(eos_token_ids),
    }
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", __file__],
            input=json.dumps(task).encode(),
            capture_output=True,
            timeout=WALL_S,
            start_new_session=True,  # a Ctrl-C at the terminal is no fault of the form
        )
    except subprocess.TimeoutExpired:
        return False
    if done.returncode > 0:
        raise RuntimeError(f"a form could not be tried: {done.stderr[-2000:].decode()}")
    return done.returncode == 0  # else a signal: out of time, of memory or of stack


class _Bytes:
    """A vocabulary of the 256 bytes and the special tokens, as llguidance wants to see one."""

    def __init__(self, vocab_size: int, special: Mapping[int, bytes], eos_token_id: int) -> None:
        self.eos_token_id = eos_token_id
        self.bos_token_id = None
        self.special_token_ids = sorted(special)
        self.tokens = [special.get(i, b"") for i in range(vocab_size)]
        free = (i for i in range(vocab_size) if i not in special)
        self._id_of = dict(zip(range(256), free, strict=False))
        for byte, token_id in self._id_of.items():
            self.tokens[token_id] = bytes([byte])

    def __call__(self, text: str) -> list[int]:
        return [self._id_of[byte] for byte in text.encode() if byte in self._id_of]


def _main() -> int:
    """Compile what comes in on standard input."""
    task = json.load(sys.stdin)
    cpu_s, memory_bytes = task["limits"]
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for kind, most in ((resource.RLIMIT_CPU, cpu_s), (resource.RLIMIT_AS, memory_bytes)):
        hard = resource.getrlimit(kind)[1]  # nobody may raise it again
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))
    sys.path[:] = task["path"]  # without `site`, which takes as long as all the rest
    import llguidance

    done: list[bool] = []

    def compile_form() -> None:
        special = {i: word.encode("latin-1") for i, word in task["special"]}
        words = _Bytes(task["vocab_size"], special, task["eos"][0])
        wrapper = llguidance.TokenizerWrapper(words)
        tokenizer = llguidance.LLTokenizer(wrapper, task["vocab_size"], task["eos"], slices=[])
        matcher = llguidance.LLMatcher(tokenizer, task["text"], log_level=0)
        done.append(matcher.is_error() or bool(matcher.compute_bitmask()))

    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=compile_form)
    thread.start()
    thread.join()
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(_main())
