"""docs/models.md is what the registry and the rename tables say."""

from __future__ import annotations

from mgvq_runtime.models.registry import FAMILIES
from tests.docs.models_page import PAGE, rewritten


def test_the_tables_are_current() -> None:
    page = PAGE.read_text()
    assert rewritten(page) == page, "run: python -m tests.docs.models_page"
    assert all(f"`{name}`" in page for name in FAMILIES)
