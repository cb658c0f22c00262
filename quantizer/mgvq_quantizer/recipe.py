"""The settings of one quantization run (read by `pipeline`; the command line is made from it).

Every field's docstring is its help on the command line; every default is written here and nowhere
else. Two runs with equal recipes, sources and calibration write the same bytes.
"""

from __future__ import annotations

import dataclasses
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mgvq_kernels.layout import CODECS, TRELLIS_RATES, TRELLIS_WINDOW, TRELLIS_WINDOWS
from mgvq_runtime.errors import ConfigError

RATES = (1, 2, 3, 4, 8)
"""Bits a weight that a band of channels may get, with lookups."""
ALLOCATIONS = ("model", "layer", "uniform")

_LEAST = {
    "seed": 0,
    "max_codebook_overhead": 0,
    "max_samples": 2,
    "max_pictures": 1,
    "max_image_tokens": 1,
    "codebook_iterations": 1,
    "refit_rounds": 1,
    "tuning_batch_tokens": 1,
    "descent_sweeps": 0,
    "picture_swaps": 0,
    "tuning_steps": 0,
    "block_steps": 0,
    "shift_threshold": 0,
    "shift_radius": 0,
    "class_threshold": 0,
}

_ROUNDS = {"lookup": 4, "trellis": 1}
"""`refit_rounds` where they are not given, by codec."""
_DRAW_OUT = 0.5
"""`draw_out` where it is not given and nothing descends."""

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "fast": {"refit_rounds": 2, "picture_swaps": 1},
    "default": {},
    "best": {"refit_rounds": 6, "codebook_iterations": 30, "tuning_steps": 800},
}
"""Settings of the presets that differ from the defaults."""


_NEEDS: Mapping[str, tuple[str, tuple[Any, ...]]] = {
    "window": ("codec", ("trellis",)),
    "survey_bits": ("allocation", ("model", "layer")),
    "class_threshold": ("channel_classes", (True,)),
    "shift_threshold": ("gradient_shift", (True,)),
    "shift_radius": ("gradient_shift", (True,)),
}
"""Settings that do nothing but with certain values of another one."""

TUNING_ONLY = ("tuning_steps", "picture_swaps")
"""Settings that leave the rounded matrices as they are."""
ROUNDING_ONLY = (
    "bits",  # with the next it decides `rates` and `reference_rate`
    "survey_bits",
    "allocation",
    "guided",
    "two_sided",
    "gradient_shift",
    "mismatch",
    "output_shrink",
    "shift_threshold",
    "shift_radius",
    "channel_classes",
    "class_threshold",
    "vision_bits",
    "embedding_bits",
    "max_pictures",
    "refit_rounds",
    "descent_sweeps",
    "draw_out",
    "max_codebook_overhead",
    "permute",
    "bias_correction",
    "block_steps",
    "tuning_batch_tokens",
    "codebook_lr",
    "scale_lr",
)
"""Settings that leave the survey as it is."""


@dataclass(frozen=True)
class QuantRecipe:
    """Settings of a run; every one of them changes the result, so a resumed run needs the same.

    Raises:
        ConfigError: if a value is out of range, naming the field.
    """

    bits: float = 2.25
    """Bits a weight of the decoder's linear layers, counted in full: codes, tables, scales, order;
    with uniform allocation the bits of the codes alone."""
    allocation: str = "model"
    """How the bits are spent: one budget for the model, one for each layer, or uniform."""
    survey_bits: float = 0.0
    """The bits whose neighbouring rates a survey tries, so that runs with several bits can share
    one; 0 stands for bits."""
    codec: str = "lookup"
    """What a code names: a vector looked up in a table of 256, or a step of a trellis, which loses
    less on most matrices and takes longer to find and to decode."""
    window: int = TRELLIS_WINDOW
    """Bits of the code stream that name a weight's entry in the table of a trellis, 8 to 12."""
    global_share: float = 0.7
    """Weight of the end loss against each layer's own error where sensitivity is measured."""
    guided: bool = False
    """Weight calibration tokens by their gradients where the decoder is rounded."""
    two_sided: bool = False
    """Try each decoder matrix with errors that also flow between its rows, as the curvature of its
    outputs says; kept where held-out gradients say that it is better."""
    gradient_shift: bool = False
    """Try each decoder matrix rounded to a target shifted down the gradient of the divergence;
    kept like two_sided."""
    mismatch: float = 0.5
    """Round each decoder matrix towards what makes up for this share of the error of its inputs,
    and of the stream it adds to, as far as the inputs tell it; 0 to 1."""
    output_shrink: float = 0.2
    """Share of the identity in the curvature of a matrix's outputs."""
    shift_threshold: float = 0.7
    """Standard errors a gradient's coordinate must stand out by, as a share of the largest that
    noise alone would show."""
    shift_radius: float = 0.5
    """Longest gradient shift as a share of the rounding error."""
    vision_bits: int = 4
    """Bits a weight of the vision tower and the merger."""
    embedding_bits: float = 4.0
    """Bits a weight of the token embedding and the output head: of the codes alone where it is a
    whole number, which is every row's; of codes and tables with another, and rows that are used
    more get more, in a few runs of rows."""
    keep: str = ""
    """Matrices to leave unquantized, in float16: patterns of module names such as visual.* with
    commas between; bits is about those that are quantized."""
    seed: int = 0
    """Seed of codebooks, permutations and tuning batches."""
    max_samples: int = 512
    """Most calibration conversations to use; they are drawn evenly from the file."""
    max_pictures: int = 96
    """Most calibration pictures for the vision tower; the decoder sees all of them."""
    max_image_tokens: int | None = None
    """Most tokens of one calibration picture, larger ones are scaled down; when not given, the
    default of the model's family, which is what a server takes too."""
    heldout_share: float = 0.125
    """Share of the calibration conversations kept aside to stop tuning and to report KL."""
    damping: float = 0.01
    """Share of the mean diagonal added to a layer's second moment before it is factored."""
    codebook_iterations: int = 20
    """Rounds of expectation-maximisation that start a codebook."""
    refit_rounds: int | None = None
    """Rounds of re-assignment and least-squares refit of codebooks and row scales, the last of them
    drawn out where draw_out says so; when not given, 4 with lookups and 1 with a trellis."""
    descent_sweeps: int = 0
    """Coordinate descent passes over the codes after each assignment; they take the place of
    draw_out, as they would draw its values in again."""
    draw_out: float | None = None
    """How far what bands of few bits hold is stored as large as it was on average, 1, and not drawn
    in as the least squares would have it, 0; the scales of rows go on losing the least squares.
    When not given, 0.5, or 0 with descent."""
    max_codebook_overhead: float = 0.05
    """Bits a weight a matrix may spend on tables of its own; above it they are shared by kind."""
    channel_classes: bool = False
    """Give decoder channels that pictures feed, text feeds or both their own bands and tables; no
    gain on the demonstration model."""
    class_threshold: float = 1.0
    """Least log ratio of the pictures' energy to the text's, or the reverse, that makes a channel
    visual or textual."""
    permute: bool = True
    """Order input channels by sensitivity, sorted or interleaved, and store the order."""
    bias_correction: bool = True
    """Put the mean output error of a rounded layer into the bias, where the layer has one."""
    block_steps: int = 0
    """Steps of tuning for each decoder block against the unquantized one, right after it is
    rounded; 0 switches it off."""
    tuning_steps: int = 60
    """Steps of end-to-end tuning against the unquantized model; 0 switches it off."""
    picture_swaps: int = 4
    """How often tuning repeats each conversation with other pictures of the same size."""
    tuning_batch_tokens: int = 2048
    """Tokens a tuning step sees, at least one conversation."""
    codebook_lr: float = 1e-3
    """Adam's first step for codebooks, relative to each codebook's root mean square."""
    scale_lr: float = 5e-4
    """Adam's first step for row scales, norms and biases, relative to their own size."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "embedding_bits", float(self.embedding_bits))
        self._check_ranges()
        if self.allocation not in ALLOCATIONS:
            raise ConfigError(
                f"allocation must be one of {', '.join(ALLOCATIONS)}, got {self.allocation!r}"
            )
        if not 1.0 <= self.bits <= 8.0:
            raise ConfigError(f"bits must lie between 1.0 and 8.0, got {self.bits}")
        if not 1.0 <= self._surveyed_bits <= 8.0:
            raise ConfigError(f"survey_bits must lie between 1.0 and 8.0, got {self.survey_bits}")
        self._check_rates()
        if not self.permute and (self.allocation != "uniform" or self.channel_classes):
            raise ConfigError(
                "bands of several rates need permute, and so do channel_classes: choose allocation "
                "uniform without them, or permute"
            )
        self._check_idle()
        if self.draw_out and self.descent_sweeps:
            raise ConfigError(
                "descent_sweeps draw in again what draw_out draws out: one of them must be 0, got "
                f"{self.descent_sweeps} and {self.draw_out}"
            )

    def _check_ranges(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"{field.name} must be a finite number, got {value}")
        for name in ("global_share", "mismatch", "draw_out"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value <= 1.0:
                raise ConfigError(f"{name} must lie in 0..1, got {value}")
        for name in ("damping", "heldout_share", "output_shrink", "codebook_lr", "scale_lr"):
            value = getattr(self, name)
            if not 0.0 < value < 1.0:
                raise ConfigError(f"{name} must lie between 0 and 1, got {value}")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} must be at least {least}, got {value}")

    def _check_idle(self) -> None:
        for field in dataclasses.fields(self):
            if field.name not in _NEEDS or getattr(self, field.name) == field.default:
                continue
            other, values = _NEEDS[field.name]
            if getattr(self, other) not in values:
                raise ConfigError(
                    f"{field.name} does nothing unless {other} is {' or '.join(map(str, values))}: "
                    f"leave it out, or change {other}, which is {getattr(self, other)}"
                )

    def _check_rates(self) -> None:
        if self.codec not in CODECS:
            raise ConfigError(f"codec must be one of {', '.join(CODECS)}, got {self.codec!r}")
        if self.window not in TRELLIS_WINDOWS:
            raise ConfigError(f"window must lie between 8 and 12, got {self.window}")
        whole = ["vision_bits"] if self.has_row_parts else ["vision_bits", "embedding_bits"]
        for name in [*whole, "bits"] if self.allocation == "uniform" else whole:
            if getattr(self, name) not in self.known_rates:
                raise ConfigError(
                    f"{name} must be one of {', '.join(map(str, self.known_rates))}, "
                    f"got {getattr(self, name)} with codec {self.codec}"
                )
        if not self.known_rates[0] <= self.embedding_bits <= self.known_rates[-1]:
            raise ConfigError(
                f"embedding_bits must lie between {self.known_rates[0]} and "
                f"{self.known_rates[-1]} with codec {self.codec}, got {self.embedding_bits}"
            )
        if self.codec == "trellis" and (self.two_sided or self.bits > TRELLIS_RATES[-1]):
            raise ConfigError(
                f"a trellis takes up to {TRELLIS_RATES[-1]} bits and no two_sided, whose rows are "
                "rounded in turn: choose codec lookup, or less"
            )

    def to_json(self) -> dict[str, Any]:
        """Return the settings by name, with what the codec decides where they were not given."""
        taken = {"refit_rounds": self.rounds, "draw_out": self.drawn_out}
        return dataclasses.asdict(self) | taken

    @property
    def kept_patterns(self) -> tuple[str, ...]:
        """The patterns of `keep`."""
        return tuple(part for text in self.keep.split(",") if (part := text.strip()))

    @property
    def gated(self) -> bool:
        """Whether decoder matrices are rounded in several ways, of which the best is kept."""
        return self.two_sided or self.gradient_shift

    @property
    def rounds(self) -> int:
        """Rounds of assignment and refit that a rounding takes."""
        return _ROUNDS[self.codec] if self.refit_rounds is None else self.refit_rounds

    @property
    def drawn_out(self) -> float:
        """How far values of few bits are drawn out."""
        if self.draw_out is not None:
            return self.draw_out
        return 0.0 if self.descent_sweeps else _DRAW_OUT

    @property
    def has_row_parts(self) -> bool:
        """Whether rows of token table and head get bits by their use."""
        return not self.embedding_bits.is_integer()

    @property
    def known_rates(self) -> tuple[int, ...]:
        """Rates that the codec has."""
        return TRELLIS_RATES if self.codec == "trellis" else RATES

    @property
    def _surveyed_bits(self) -> float:
        return self.survey_bits or self.bits

    @property
    def rates(self) -> tuple[int, ...]:
        """Rates that bands of the decoder may get: those near the target."""
        if self.allocation == "uniform":
            return (int(self.bits),)
        near = (self._surveyed_bits / 2.5, 2.5 * self._surveyed_bits)
        return tuple(rate for rate in self.known_rates if near[0] <= rate <= near[1])

    @property
    def reference_rate(self) -> int:
        """The rate nearest to the target."""
        return min(self.rates, key=lambda rate: abs(rate - self._surveyed_bits))

    def rates_of(self, group: str) -> tuple[int, ...]:
        """Return the rates of a group of `mgvq_runtime.checkpoint.bits.group_of`."""
        if group == "embedding":
            return self.known_rates if self.has_row_parts else (int(self.embedding_bits),)
        return (self.vision_bits,) if group in ("vision", "projector") else self.rates


def make_recipe(preset: str, file: Path | None, settings: Mapping[str, Any]) -> QuantRecipe:
    """Return a preset, changed by a TOML file, changed by single settings.

    Args:
        preset: one of `PRESETS`.
        file: top-level keys are the recipe's fields.
        settings: fields by name.

    Raises:
        ConfigError: if the file cannot be read, or has a key or a type that does not fit.
    """
    chosen = {**(_read(file) if file else {}), **settings}
    start = dict(PRESETS[preset])
    if chosen.get("codec") == "trellis":
        start.pop("refit_rounds", None)  # a trellis is searched once, whatever the preset
    return QuantRecipe(**{**start, **chosen})


def setting_type(field: dataclasses.Field[Any]) -> type:
    """Return the type of a field's values where they are given."""
    if field.default is not None:
        return type(field.default)
    return float if "float" in str(field.type) else int


def _read(file: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(file.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"the recipe {file} cannot be read: {error}") from error
    kinds = {field.name: setting_type(field) for field in dataclasses.fields(QuantRecipe)}
    for name, value in values.items():
        if name not in kinds:
            raise ConfigError(f"{file}: {name!r} is no setting; settings are {', '.join(kinds)}")
        kind = kinds[name]
        if kind is float and type(value) is int:
            values[name] = float(value)
        elif type(value) is not kind:
            raise ConfigError(f"{file}: {name} must be {kind.__name__}, got {value!r}")
    return values
