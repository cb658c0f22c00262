"""The table of quantizers that `mgvq-eval compare` knows (for `cli`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial

from mgvq_quantizer.baselines.gptvq import gptvq
from mgvq_quantizer.baselines.interface import Baseline
from mgvq_quantizer.baselines.ours import VARIANTS, Variant
from mgvq_quantizer.baselines.quip import quip
from mgvq_quantizer.baselines.rsavq import rsavq
from mgvq_quantizer.baselines.scalar import gptq, rtn
from mgvq_quantizer.baselines.vptq import vptq
from mgvq_runtime.errors import ConfigError


@dataclass(frozen=True)
class Method:
    """A baseline and what running it takes."""

    name: str
    label: str
    """What tables and plots call it."""
    quantize: Baseline
    is_random: bool = True
    """Whether a seed makes a difference; without, one seed is run."""
    needs_fisher: bool = False


METHODS = {
    method.name: method
    for method in (
        Method("rtn", "RTN, clip search", rtn, is_random=False),
        Method("gptq", "GPTQ, act-order", gptq, is_random=False),
        Method("gptvq-2d", "GPTVQ, 2-D", partial(gptvq, dim=2)),
        Method("gptvq-4d", "GPTVQ, 4-D", partial(gptvq, dim=4)),
        Method("vptq", "VPTQ-like", vptq),
        Method("quip", "LDLQ + E8P (QuIP#-like)", quip),
        Method("rsavq", "RSAVQ-like", rsavq, needs_fisher=True),
    )
}


def find_methods(patterns: Sequence[str]) -> list[Method | Variant]:
    """Return baselines and variants of MGVQ by name or pattern, each once.

    Raises:
        ConfigError: if a pattern fits no name; lists the names.
    """
    known: dict[str, Method | Variant] = {**METHODS, **VARIANTS}
    found: dict[str, Method | Variant] = {}
    for pattern in patterns:
        names = [name for name in known if fnmatchcase(name, pattern)]
        if not names:
            raise ConfigError(f"{pattern!r} is no known method: choose from {', '.join(known)}")
        found |= {name: known[name] for name in names}
    return list(found.values())
