"""The environment variables of this project, all of them (read by the command-line tools).

Settings are flags and config fields; a variable exists only where no flag can reach. Nothing else
reads the environment, and nothing is read at import. A value that does not parse stops the program.
"""

from __future__ import annotations

import os

from mgvq_runtime.errors import ConfigError

TRUE_WORDS = {"1", "true", "yes", "on"}
FALSE_WORDS = {"", "0", "false", "no", "off"}


def debug_tracebacks() -> bool:
    """Say whether `MGVQ_DEBUG` asks the tools for a traceback beside the one-line error.

    Raises:
        ConfigError: if the variable is set to a word that is neither true nor false.
    """
    return _flag("MGVQ_DEBUG")


def _flag(name: str) -> bool:
    value = os.environ.get(name, "").strip().lower()
    if value in TRUE_WORDS | FALSE_WORDS:
        return value in TRUE_WORDS
    words = ", ".join(sorted(TRUE_WORDS | FALSE_WORDS - {""}))
    raise ConfigError(f"environment variable {name} is {value!r}; expected one of: {words}")
