"""README and docs against the disk: links, the tree, commands and snippets."""

from __future__ import annotations

import ast
import re
import shlex
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 250


def test_tree_matches_the_disk() -> None:
    tree = re.search(r"```text\n(.*?)```", README, re.S)
    assert tree is not None
    parent = ""
    for line in tree.group(1).splitlines():
        name = line.split()[0] if line.strip() else ""
        if not name:
            continue
        if line[0] != " ":
            parent = name
            path = ROOT / name
        else:
            path = ROOT / parent / name
        assert path.exists(), f"README's tree names {path.relative_to(ROOT)}"


def test_python_snippets_parse() -> None:
    snippets = re.findall(r"```python\n(.*?)```", README, re.S)
    assert snippets
    for snippet in snippets:
        ast.parse(snippet)


def test_shell_commands_exist() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    for block in re.findall(r"```(?:sh|bash)\n(.*?)```", README, re.S):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if not words:
                continue
            if words[0] == "make":
                assert words[1] in targets, line
            elif words[0].startswith("mgvq-"):
                assert words[0] in scripts, line
