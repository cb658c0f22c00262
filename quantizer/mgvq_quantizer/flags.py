"""Types of command line flags (for `cli`, `evaluate_cli`, `baselines.cli`)."""

from __future__ import annotations

import argparse


def positive(text: str) -> int:
    """Read a whole number of at least 1; argparse names the flag where this raises.

    Raises:
        ArgumentTypeError: saying what was expected and what came.
    """
    return _at_least(1, text)


def natural(text: str) -> int:
    """Read a whole number of at least 0, as `positive`."""
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {text}")
    return number
