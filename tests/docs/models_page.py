"""Writes the tables of docs/models.md from the registry, the rename tables and published shapes.

`python -m tests.docs.models_page` from the top of the tree rewrites them; `test_models_page` fails
where the page says something else.
"""

from __future__ import annotations

import re
from pathlib import Path

from mgvq_runtime.checkpoint.hf_names import DIALECTS
from mgvq_runtime.models.registry import FAMILIES
from mgvq_runtime.models.sizes import measure
from tests.runtime.models.published import PUBLISHED

PAGE = Path(__file__).resolve().parents[2] / "docs/models.md"
CONTEXT = 8192


def family_table() -> str:
    """One row a family: architecture strings, and the spellings of tensor names that are read."""
    rows = [
        "| family | `architectures` in config.json | tensor names | tokens of a picture, at most |"
    ]
    rows.append("|---|---|---|---|")
    for name in dict.fromkeys(family.name for family in FAMILIES.values()):
        members = [family for family in FAMILIES.values() if family.name == name]
        architectures = "<br>".join(f"`{family.architecture}`" for family in members)
        spellings = [d.name.removeprefix(f"{name}, ") for d in DIALECTS if d.name.startswith(name)]
        if not spellings:
            spellings = [dialect.name for dialect in DIALECTS if ", " not in dialect.name]
        most = members[0].max_image_tokens
        tokens = "no pictures" if most is None else f"{most:,}"
        rows.append(f"| {name} | {architectures} | {'<br>'.join(spellings)} | {tokens} |")
    return "\n".join(rows)


def size_table() -> str:
    """One row a published size: parameters, bytes, and what it takes to run."""
    rows = [
        "| model | parameters | 16 bits | MGVQ, 2 bits | KV cache, a token | memory, 8k context |"
    ]
    rows.append("|---|---:|---:|---:|---:|---:|")
    for name, config in PUBLISHED.items():
        size = measure(config)
        memory = size.mgvq_bytes + CONTEXT * size.kv_token_bytes
        rows.append(
            f"| {name} | {size.parameters / 1e9:.2f} B | {size.dense_bytes / 2**30:.2f} GiB "
            f"| {size.mgvq_bytes / 2**30:.2f} GiB | {size.kv_token_bytes / 2**10:.0f} KiB "
            f"| {memory / 2**30:.2f} GiB |"
        )
    return "\n".join(rows)


def rewritten(page: str) -> str:
    """Return the page with both tables made anew."""
    for name, table in (("families", family_table()), ("sizes", size_table())):
        pattern = rf"(<!-- {name}: generated -->\n).*?(<!-- end -->)"
        new = rf"\g<1>{table}\n\g<2>"
        page, count = re.subn(pattern, new, page, flags=re.S)
        assert count == 1, f"docs/models.md has no place for the table of {name}"
    return page


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text()))
