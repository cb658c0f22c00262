"""What an MGVQ checkpoint says of its matrices (called by reader, writer and quantizer).

The contents of `config.json["quantization_config"]`: bands, stages and shared codebooks of every
quantized matrix, and from them the name, dtype and shape of every tensor on disk. Here are facts
only: no file is opened, no tensor is held. Prose and a worked example: `docs/checkpoint_format.md`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mgvq_kernels.layout import Band, Stage, VQLayout
from mgvq_runtime.checkpoint.row_parts import is_part
from mgvq_runtime.errors import CheckpointError

QUANT_METHOD = "mgvq"
FORMAT_VERSION = 1
"""Of a checkpoint whose matrices are all lookups."""
TRELLIS_VERSION = 2
"""Of one that holds a trellis matrix, or a table in parts, which a reader of version 1 would
misunderstand."""
READ_VERSIONS = (FORMAT_VERSION, TRELLIS_VERSION)

MODULE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z0-9_]+)*")
CODEBOOK_NAME = re.compile(r"[A-Za-z0-9_-]{1,100}")
CODEBOOK_PREFIX = "codebooks"
MAX_NAME_LENGTH = 200
MAX_BITS_PER_WEIGHT = 1e6
"""Of a matrix of a few weights that pays for a whole codebook; real ones stay under 17."""

SPEC_KEYS = (
    "quant_method",
    "format_version",
    "matrices",
    "bits_per_weight",
    "recipe",
    "calibration",
    "tool_version",
    "source_fingerprint",
)

STAGE_KEYS: Mapping[str, tuple[str, ...]] = {"lookup": (), "trellis": ("rate", "window")}
"""What a stage of each codec says of itself beside its vector dimension."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class TensorSpec:
    """One tensor on disk: its safetensors dtype word and its shape."""

    dtype: str
    shape: Shape

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True)
class MatrixSpec:
    """How one matrix is stored."""

    layout: VQLayout
    codebooks: tuple[tuple[str | None, ...], ...] = ()
    """[band][stage]: the name of a shared codebook, None for the matrix's own; () shares none."""

    def __post_init__(self) -> None:
        stages = [len(band.stages) for band in self.layout.bands]
        if not self.codebooks:
            object.__setattr__(self, "codebooks", tuple((None,) * count for count in stages))
        if [len(names) for names in self.codebooks] != stages:
            raise CheckpointError(
                f"codebook names are given for {[len(names) for names in self.codebooks]} stages "
                f"a band, the layout has {stages}"
            )
        for name in (name for names in self.codebooks for name in names if name is not None):
            if not CODEBOOK_NAME.fullmatch(name):
                raise CheckpointError(
                    f"codebook name {name!r} may use letters, digits, _ and - only"
                )

    def to_json(self) -> dict[str, Any]:
        """Return the matrix as it stands in config.json."""
        bands = []
        for band, names in zip(self.layout.bands, self.codebooks, strict=True):
            stages: list[dict[str, Any]] = []
            for stage, name in zip(band.stages, names, strict=True):
                stages.append({"vector_dim": stage.vector_dim, "codec": stage.codec})
                stages[-1] |= {key: getattr(stage, key) for key in STAGE_KEYS[stage.codec]}
                if name is not None:
                    stages[-1]["codebook"] = name
            bands.append({"width": band.width, "stages": stages})
        return {
            "shape": [self.layout.out_features, self.layout.in_features],
            "permutation": self.layout.has_permutation,
            "bands": bands,
        }

    @classmethod
    def from_json(cls, value: object) -> MatrixSpec:
        """Read what `to_json` wrote.

        Raises:
            CheckpointError: if a key is missing, unknown, or has a value that cannot be.
        """
        entry = _object("a matrix", value, ("shape", "permutation", "bands"))
        shape = [_integer("shape", size) for size in _list("shape", entry["shape"])]
        if len(shape) != 2:
            raise CheckpointError(f"shape must be [out_features, in_features], got {shape}")
        if not isinstance(entry["permutation"], bool):
            raise CheckpointError(
                f"permutation must be true or false, got {entry['permutation']!r}"
            )
        bands: list[Band] = []
        names: list[tuple[str | None, ...]] = []
        start = 0
        try:
            for value_of_band in _list("bands", entry["bands"]):
                band = _object("a band", value_of_band, ("width", "stages"))
                stages = [_read_stage(stage) for stage in _list("stages", band["stages"])]
                width = _integer("width", band["width"])
                bands.append(Band(start, width, tuple(stage for stage, _ in stages)))
                names.append(tuple(name for _, name in stages))
                start += width
            layout = VQLayout(shape[0], shape[1], tuple(bands), entry["permutation"])
        except (ValueError, TypeError, NotImplementedError) as error:
            raise CheckpointError(str(error)) from error
        return cls(layout, tuple(names))


@dataclass(frozen=True)
class QuantizationSpec:
    """Everything an MGVQ checkpoint says about itself."""

    matrices: Mapping[str, MatrixSpec]
    """By module name, such as "model.layers.0.self_attn.qkv_proj"."""
    bits_per_weight: Mapping[str, float] = field(default_factory=dict)
    """"target", and what was counted, by group; the writer fills the counted ones in."""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the quantization run; kept, never interpreted."""
    calibration: Mapping[str, Any] = field(default_factory=dict)
    """What the run was calibrated on; kept, never interpreted."""
    tool_version: str = ""
    """Version of the program that wrote the checkpoint."""
    source_fingerprint: str = ""
    """Digest of the unquantized folder, from `files.fingerprint_folder`."""

    def __post_init__(self) -> None:
        check_names(self.matrices)

    def layouts(self) -> dict[str, VQLayout]:
        """Return the layout of every quantized matrix by module name."""
        return {name: matrix.layout for name, matrix in self.matrices.items()}

    @property
    def format_version(self) -> int:
        """The lowest version whose readers understand every matrix."""
        versions = [_version_of(name, matrix)[0] for name, matrix in self.matrices.items()]
        return max(versions, default=FORMAT_VERSION)

    def shared_codebooks(self) -> dict[str, Shape]:
        """Return the shape `[entries, vector_dim]` of every shared codebook by name."""
        return {
            name: _book_shape(stage)
            for matrix in self.matrices.values()
            for band, names in zip(matrix.layout.bands, matrix.codebooks, strict=True)
            for stage, name in zip(band.stages, names, strict=True)
            if name is not None
        }

    def to_json(self) -> dict[str, Any]:
        """Return the contents of `config.json["quantization_config"]`."""
        return {
            "quant_method": QUANT_METHOD,
            "format_version": self.format_version,
            "matrices": {name: matrix.to_json() for name, matrix in self.matrices.items()},
            "bits_per_weight": dict(self.bits_per_weight),
            "recipe": dict(self.recipe),
            "calibration": dict(self.calibration),
            "tool_version": self.tool_version,
            "source_fingerprint": self.source_fingerprint,
        }

    @classmethod
    def from_json(cls, value: object) -> QuantizationSpec:
        """Read `config.json["quantization_config"]`.

        Raises:
            CheckpointError: with every problem found; an unknown key comes with the nearest known.
        """
        check_method(value)
        entry = _object("quantization_config", value, SPEC_KEYS)
        matrices: dict[str, MatrixSpec] = {}
        problems: list[str] = []
        for name, matrix in _mapping("matrices", entry["matrices"]).items():
            try:
                matrices[name] = MatrixSpec.from_json(matrix)
            except CheckpointError as error:
                problems.append(f"{name}: {error}")
        for name, matrix in matrices.items():
            version, reason = _version_of(name, matrix)
            if entry["format_version"] < version:
                problems.append(
                    f"{name}: {reason} needs format_version {version}, the file says "
                    f"{entry['format_version']}"
                )
        bits = _mapping("bits_per_weight", entry["bits_per_weight"])
        for name, number in bits.items():
            if type(number) not in (int, float) or not 0 <= number < MAX_BITS_PER_WEIGHT:
                problems.append(f"bits_per_weight: {name[:100]!r} must be a number of bits")
        for key in ("tool_version", "source_fingerprint"):
            if not isinstance(entry[key], str):
                problems.append(f"{key} must be a string, got {entry[key]!r}")
        if problems:
            raise CheckpointError("quantization_config cannot be used", problems)
        return cls(
            matrices,
            bits,
            _mapping("recipe", entry["recipe"]),
            _mapping("calibration", entry["calibration"]),
            entry["tool_version"],
            entry["source_fingerprint"],
        )


def check_method(value: object) -> None:
    """Refuse a `quantization_config` that another method or a later format version wrote.

    Raises:
        CheckpointError: naming the method or version found and what this version reads.
    """
    method = value.get("quant_method") if isinstance(value, Mapping) else None
    if not isinstance(value, Mapping) or method != QUANT_METHOD:
        raise CheckpointError(
            f"the checkpoint is quantized with {method!r}; this runtime reads {QUANT_METHOD!r} and "
            "unquantized checkpoints: quantize the original with mgvq-quantize"
        )
    version = value.get("format_version")
    if type(version) is not int or version not in READ_VERSIONS:
        raise CheckpointError(
            f"format_version is {version!r}; this version of MGVQ Runtime reads {READ_VERSIONS}: "
            "use the version that wrote the checkpoint, or a later one"
        )


def matrix_tensors(name: str, matrix: MatrixSpec) -> Iterator[tuple[str, TensorSpec]]:
    """List the tensors on disk that belong to one matrix, shared codebooks left out.

    Args:
        name: the module's name.
        matrix: how it is stored.

    Yields:
        Tensor name with its dtype word and shape.
    """
    layout = matrix.layout
    for b, band in enumerate(layout.bands):
        for s, stage in enumerate(band.stages):
            yield f"{name}.codes.{b}.{s}", TensorSpec("U8", layout.code_shape(b, s))
            if matrix.codebooks[b][s] is None:
                yield f"{name}.codebook.{b}.{s}", TensorSpec("I8", _book_shape(stage))
                yield f"{name}.codebook_scale.{b}.{s}", TensorSpec("F32", ())
    yield f"{name}.scales", TensorSpec("F16", (layout.out_features,))
    if layout.has_permutation:
        yield f"{name}.permutation", TensorSpec(f"I{layout.channel_bits}", (layout.in_features,))


def codebook_tensors(name: str, shape: Shape) -> Iterator[tuple[str, TensorSpec]]:
    """List the two tensors on disk of a shared codebook, entries first, then their scale."""
    yield f"{CODEBOOK_PREFIX}.{name}", TensorSpec("I8", shape)
    yield f"{CODEBOOK_PREFIX}.{name}.scale", TensorSpec("F32", ())


def quantized_tensors(quantization: QuantizationSpec) -> dict[str, TensorSpec]:
    """Return every tensor on disk that the quantized matrices take, by name."""
    tensors: dict[str, TensorSpec] = {}
    for name, matrix in quantization.matrices.items():
        tensors.update(matrix_tensors(name, matrix))
    for name, shape in quantization.shared_codebooks().items():
        tensors.update(codebook_tensors(name, shape))
    return tensors


def check_names(matrices: Mapping[str, MatrixSpec]) -> None:
    """Refuse names that cannot be module names, and shared codebooks of two shapes.

    Raises:
        CheckpointError: with every problem found.
    """
    problems: list[str] = []
    shapes: dict[str, Shape] = {}
    for name, matrix in matrices.items():
        if not is_module_name(name):
            problems.append(f"{name[:MAX_NAME_LENGTH]!r} is not the name of a module")
            continue
        for band, names in zip(matrix.layout.bands, matrix.codebooks, strict=True):
            for stage, shared in zip(band.stages, names, strict=True):
                shape = _book_shape(stage)
                if shared and shapes.setdefault(shared, shape) != shape:
                    entries, dim = shapes[shared]
                    problems.append(
                        f"{name} uses codebook {shared!r} with vector_dim {stage.vector_dim} and "
                        f"{stage.codebook_size} entries, another stage with vector_dim {dim} and "
                        f"{entries}"
                    )
    if problems:
        raise CheckpointError("the quantized matrices contradict each other", problems)


def is_module_name(name: str) -> bool:
    """Say whether a name can be a module's or parameter's: dotted words, not a codebook's place."""
    return (
        len(name) <= MAX_NAME_LENGTH
        and MODULE_NAME.fullmatch(name) is not None
        and name.split(".")[0] != CODEBOOK_PREFIX
    )


def _version_of(name: str, matrix: MatrixSpec) -> tuple[int, str]:
    """Return the lowest version that knows a matrix, and what about it needs that version."""
    if matrix.layout.codec == "trellis":
        return TRELLIS_VERSION, "codec 'trellis'"
    return (TRELLIS_VERSION, "a part") if is_part(name) else (FORMAT_VERSION, "")


def _book_shape(stage: Stage) -> Shape:
    """Shape of a stage's codebook."""
    return (stage.codebook_size, stage.vector_dim)


def _read_stage(value: object) -> tuple[Stage, str | None]:
    codec = value.get("codec") if isinstance(value, dict) else None
    if isinstance(codec, str) and codec not in STAGE_KEYS:
        raise CheckpointError(f"codec {codec!r} is not known; known: {', '.join(STAGE_KEYS)}")
    keys = STAGE_KEYS[codec] if isinstance(codec, str) else ()
    what = "a stage" if codec != "trellis" else "a trellis stage"
    entry = _object(what, value, ("vector_dim", "codec", *keys), optional=("codebook",))
    name = entry.get("codebook")
    if not isinstance(codec, str) or not isinstance(name, str | None):
        raise CheckpointError(f"codec and codebook of a stage must be strings, got {value!r}")
    numbers = {key: _integer(key, entry[key]) for key in ("vector_dim", *keys)}
    return Stage(codec=codec, **numbers), name


def _object(
    what: str, value: object, required: Sequence[str], optional: Sequence[str] = ()
) -> dict[str, Any]:
    entry = _mapping(what, value)
    if missing := [key for key in required if key not in entry]:
        raise CheckpointError(f"{what} lacks {', '.join(missing)}")
    known = (*required, *optional)
    for key in entry:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise CheckpointError(f"{what} has the unknown key {key[:100]!r}{hint}")
    return entry


def _mapping(what: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} must be a JSON object, got {type(value).__name__}")
    return value


def _list(what: str, value: object) -> list[Any]:
    if not isinstance(value, list):
        raise CheckpointError(f"{what} must be a list, got {type(value).__name__}")
    return value


def _integer(what: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise CheckpointError(f"{what} must be a whole number, got {value!r}")
    return value
