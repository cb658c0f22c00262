"""How an engine runs on this machine, as one frozen dataclass (called by every front door).

`EngineConfig` is what a user says; `engine.startup` settles every "auto" once and gives a
`ResolvedConfig`. The command line takes flags, defaults and help from the fields below, so each
default is written once. Model shapes are not here (`models.config`), nor limits on pictures
(`multimodal.image.MediaLimits`).
"""

from __future__ import annotations

import argparse
import ast
import difflib
import inspect
import re
import textwrap
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any

from mgvq_runtime.errors import ConfigError

DEFAULT_MAX_MODEL_LEN = 8192
MAX_AUTO_KV_CACHE_BYTES_CPU = 1 << 30
DTYPES = ("auto", "float32", "float16", "bfloat16")
KV_CACHE_DTYPES = ("auto", "int8")
EMBEDDING_DEVICES = ("auto", "host", "device")
SPECULATIONS = ("off", "n-gram")


@dataclass(frozen=True)
class NGramSpeculation:
    """How tokens are guessed from a request's own; the fields are those of `EngineConfig`."""

    num_speculative_tokens: int
    prompt_lookup_max: int
    prompt_lookup_min: int


@dataclass(frozen=True)
class EngineConfig:
    """Settings of an engine; each field is also a flag of `mgvq-chat` and `mgvq-serve`."""

    checkpoint: str | None = None
    """Checkpoint folder, quantized or dense; the bundled demonstration model when not given."""
    device: str = "auto"
    """Where to run: auto (a GPU if there is one), cpu, cuda or cuda:N."""
    dtype: str = "auto"
    """Type of activations: float32, float16, bfloat16, or auto (float32 on a CPU, float16 for a
    quantized and bfloat16 for a dense checkpoint on a GPU)."""
    max_model_len: int | None = None
    """Longest prompt plus answer, in tokens; the model's limit, at most 8192, when not given."""
    max_num_seqs: int = 8
    """Most requests that run at the same time; others wait."""
    max_batch_tokens: int = 1024
    """Most tokens in one step; longer prompts are read in chunks."""
    block_size: int = 16
    """Tokens in one block of the key/value cache."""
    kv_cache_bytes: int | None = None
    """Most bytes of the key/value cache; when not given, enough for max_num_seqs full contexts, at
    most 1 GiB on a CPU and what is free on a GPU."""
    kv_cache_dtype: str = "auto"
    """Type of cached keys and values: auto (that of activations), or int8 (a float16 scale a token
    and head; about half the bytes of float16, a little less exact)."""
    gpu_memory_limit: int | None = None
    """Most bytes of its device the engine may plan with, main memory on a CPU, so that a large one
    behaves like a small one; what is free when not given."""
    max_image_tokens: int | None = None
    """Most tokens one picture may cost, a larger one is scaled down; when not given, the
    default of the model's family (docs/models.md)."""
    max_batch_patches: int = 5120
    """Most patches of pictures encoded in one step, one picture at least; a larger one and a video
    go through the vision tower in parts of so many, one tile or frame at least."""
    image_cache_bytes: int = 128 << 20
    """Bytes of encoded pictures kept beside the model, and of prepared ones in main memory, for
    pictures that come again; 0 keeps none."""
    embedding_device: str = "auto"
    """Where an unquantized token table lies that is not the output head too: device, beside the
    model on a GPU; host, pinned in main memory, from where the rows of each step are copied; auto,
    host where the key/value cache would be cut short otherwise."""
    enforce_eager: bool = False
    """Launch every kernel of a decode step anew on a GPU, instead of replaying recorded steps
    (CUDA graphs); slower, but it takes less memory."""
    num_threads: int | None = None
    """CPU threads for arithmetic; all cores when not given."""
    seed: int = 0
    """Seeds the requests that bring no seed of their own."""
    deterministic: bool = False
    """Compute every token by itself, so that no answer depends on what else runs, on chunks or on
    the cache; slower, most of all for long prompts and many requests (docs/sampling.md)."""
    speculation: str = "off"
    """Whether tokens are guessed ahead and verified together: off, or n-gram, which looks the last
    tokens up in the request's own prompt and answer. Answers stay as they are, but for rounding:
    docs/sampling.md."""
    num_speculative_tokens: int = 4
    """Most tokens guessed ahead of a request in one step."""
    prompt_lookup_max: int = 4
    """Longest run of last tokens that is looked up; the longest that is found is taken."""
    prompt_lookup_min: int = 2
    """Shortest run of last tokens that is looked up."""

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if (value := getattr(self, name)) not in allowed:
                raise ConfigError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        device = str(self.device)
        index = device.removeprefix("cuda:")
        if device not in ("auto", "cpu", "cuda") and not (device != index and index.isdecimal()):
            raise ConfigError(f"device must be auto, cpu, cuda or cuda:N, got {self.device!r}")
        for name in ("deterministic", "enforce_eager"):
            if not isinstance(value := getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, got {value!r}")
        for name, low in _LOWEST.items():
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ConfigError(f"{name} must be an integer of at least {low}, got {value!r}")
        if self.max_batch_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_batch_tokens ({self.max_batch_tokens}) must be at least max_num_seqs "
                f"({self.max_num_seqs}): every running request takes one token of each step"
            )
        if self.prompt_lookup_min > self.prompt_lookup_max:
            raise ConfigError(
                f"prompt_lookup_min ({self.prompt_lookup_min}) must be at most prompt_lookup_max "
                f"({self.prompt_lookup_max})"
            )

    @property
    def n_gram_speculation(self) -> NGramSpeculation | None:
        """How tokens are guessed ahead; None where they are not."""
        if self.speculation == "off":
            return None
        return NGramSpeculation(
            self.num_speculative_tokens, self.prompt_lookup_max, self.prompt_lookup_min
        )

    @property
    def max_logits_rows(self) -> int:
        """Most rows of logits of one step: a token each request, and those that were guessed."""
        guessed = 0 if self.speculation == "off" else self.num_speculative_tokens
        return min(self.max_batch_tokens, self.max_num_seqs * (1 + guessed))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EngineConfig:
        """Build a config from named values.

        Raises:
            ConfigError: if a name is unknown (the nearest known one is given) or a value is wrong.
        """
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                raise ConfigError(f"unknown engine setting {name!r}{_nearest(name, known)}")
        return cls(**values)


_CHOICES = {
    "dtype": DTYPES,
    "embedding_device": EMBEDDING_DEVICES,
    "kv_cache_dtype": KV_CACHE_DTYPES,
    "speculation": SPECULATIONS,
}
_LOWEST = {
    "max_model_len": 2,
    "max_num_seqs": 1,
    "max_batch_tokens": 1,
    "block_size": 1,
    "kv_cache_bytes": 1,
    "gpu_memory_limit": 1,
    "max_image_tokens": 1,
    "max_batch_patches": 1,
    "image_cache_bytes": 0,
    "num_threads": 1,
    "seed": 0,
    "num_speculative_tokens": 1,
    "prompt_lookup_max": 1,
    "prompt_lookup_min": 1,
}
_OPTIONAL = (
    "max_model_len",
    "kv_cache_bytes",
    "gpu_memory_limit",
    "max_image_tokens",
    "num_threads",
)


@dataclass(frozen=True)
class ModelFacts:
    """What memory planning must know of a checkpoint."""

    max_position_embeddings: int
    is_quantized: bool
    num_hidden_layers: int
    num_key_value_heads: int
    head_dim: int


@dataclass(frozen=True)
class ResolvedConfig:
    """An `EngineConfig` with nothing left open; the engine reads only this."""

    device: str
    dtype: str
    max_model_len: int
    max_num_seqs: int
    decode_batch_sizes: tuple[int, ...]
    """Batch sizes of recorded decode steps, ascending; none where every step is launched anew."""
    max_batch_tokens: int
    block_size: int
    kv_cache_dtype: str
    """Name of a torch type."""
    num_kv_blocks: int
    """Blocks of the pool, the reserved block 0 included."""
    max_batch_patches: int
    image_cache_bytes: int
    seed: int
    deterministic: bool
    speculation: NGramSpeculation | None


def resolve_device(device: str, num_cuda_devices: int) -> str:
    """Return "cpu" or "cuda:N" for what the user asked.

    Raises:
        ConfigError: if a GPU is asked for that is not there.
    """
    if device == "auto":
        return "cuda:0" if num_cuda_devices else "cpu"
    if device == "cpu":
        return device
    index = int(device.removeprefix("cuda").removeprefix(":") or 0)
    if num_cuda_devices == 0:
        raise ConfigError(
            f"device={device!r} was asked for, but torch sees no CUDA device on this machine; "
            'use device="cpu", or install a CUDA build of torch and a driver'
        )
    if index >= num_cuda_devices:
        raise ConfigError(
            f"device={device!r} was asked for, but torch sees {num_cuda_devices} CUDA device(s), "
            f"numbered from 0"
        )
    return f"cuda:{index}"


def resolve_dtype(dtype: str, device: str, is_quantized: bool) -> str:
    """Return the name of the torch type that activations and dense weights will have."""
    if dtype != "auto":
        return dtype
    if device == "cpu":
        return "float32"
    return "float16" if is_quantized else "bfloat16"


def resolve_kv_cache_dtype(kv_cache_dtype: str, dtype: str) -> str:
    """Return the name of the torch type of the pool, where activations are of `dtype`."""
    return dtype if kv_cache_dtype == "auto" else kv_cache_dtype


def resolve_model_len(config: EngineConfig, facts: ModelFacts) -> int:
    """Return the longest context that is asked for.

    Raises:
        ConfigError: if it is beyond the model.
    """
    limit = facts.max_position_embeddings
    max_model_len = config.max_model_len or min(limit, DEFAULT_MAX_MODEL_LEN)
    if max_model_len > limit:
        raise ConfigError(
            f"max_model_len={max_model_len} is longer than the {limit} positions of this model"
        )
    return max_model_len


def kv_block_bytes(facts: ModelFacts, block_size: int, dtype: str) -> int:
    """Return the bytes of one block: keys and values of `block_size` tokens in every layer.

    Args:
        facts: Shapes of the model.
        block_size: Tokens of a block.
        dtype: Of the pool; int8 has a float16 scale a vector.
    """
    vector_bytes = facts.head_dim * {"float32": 4, "int8": 1}.get(dtype, 2)
    vector_bytes += 2 if dtype == "int8" else 0
    return 2 * facts.num_hidden_layers * facts.num_key_value_heads * vector_bytes * block_size


def add_config_arguments(
    parser: argparse.ArgumentParser, leave_out: Sequence[str] = ()
) -> argparse._ArgumentGroup:
    """Add one flag an `EngineConfig` field; default and help are the field's own.

    Args:
        parser: Parser that gets a group named "engine".
        leave_out: Names of fields that get no flag.

    Returns:
        The group, for more flags beside them.
    """
    group = parser.add_argument_group("engine")
    docs = field_docs(EngineConfig)
    types = typing.get_type_hints(EngineConfig)
    for field in fields(EngineConfig):
        if field.name in leave_out:
            continue
        default = None if field.default is MISSING else field.default
        shown = docs[field.name].rstrip(".")
        flag = "--" + field.name.replace("_", "-")
        if types[field.name] is bool:
            group.add_argument(flag, action="store_true", help=shown.replace("%", "%%"))
            continue
        if default is not None:
            shown += f" (default: {default})"
        is_integer = int in typing.get_args(types[field.name]) or types[field.name] is int
        metavar = _METAVARS.get(field.name)
        kind = byte_count if metavar == "BYTES" else int if is_integer else str
        group.add_argument(
            flag,
            type=kind,
            default=default,
            choices=_CHOICES.get(field.name),
            metavar=metavar,
            help=shown.replace("%", "%%"),
        )
    return group


_METAVARS = {
    "checkpoint": "DIR",
    "device": "DEVICE",
    "max_model_len": "TOKENS",
    "max_num_seqs": "N",
    "max_batch_tokens": "TOKENS",
    "block_size": "TOKENS",
    "kv_cache_bytes": "BYTES",
    "gpu_memory_limit": "BYTES",
    "max_image_tokens": "TOKENS",
    "max_batch_patches": "N",
    "image_cache_bytes": "BYTES",
    "num_threads": "N",
    "seed": "N",
    "num_speculative_tokens": "N",
    "prompt_lookup_max": "N",
    "prompt_lookup_min": "N",
}


def byte_count(text: str) -> int:
    """Read a number of bytes such as 4GiB, 512MiB, 2GB or 1000000.

    Raises:
        ValueError: if it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([a-z]*)", text.strip().lower())
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"expected bytes, such as 4GiB or 500MB, got {text!r}")
    return int(float(match[1]) * _UNITS[match[2]])


_UNITS = {
    "": 1,
    "b": 1,
    **{f"{p}ib": 2 ** (10 * (i + 1)) for i, p in enumerate("kmgt")},
    **{f"{p}b": 10 ** (3 * (i + 1)) for i, p in enumerate("kmgt")},
}


def config_from_arguments(arguments: argparse.Namespace) -> EngineConfig:
    """Return the config that the flags of `add_config_arguments` say.

    Raises:
        ConfigError: if a value is out of range.
    """
    names = [field.name for field in fields(EngineConfig)]
    return EngineConfig(**{n: getattr(arguments, n) for n in names if hasattr(arguments, n)})


def field_docs(config_class: type) -> dict[str, str]:
    """Return the string beneath each field of a dataclass, on one line, by field name."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(config_class)))
    body = typing.cast(ast.ClassDef, tree.body[0]).body
    docs = {}
    for statement, below in zip(body, body[1:], strict=False):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            docs[statement.target.id] = " ".join(str(below.value.value).split())
    return docs


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known ones: {', '.join(known)}"
