"""What no linter has: sizes, signs on every door, lean imports, front doors, forbidden names."""

from __future__ import annotations

import ast
import importlib
import re
import statistics
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {
    "mgvq_kernels": ROOT / "kernels/mgvq_kernels",
    "mgvq_runtime": ROOT / "mgvq_runtime",
    "mgvq_quantizer": ROOT / "quantizer/mgvq_quantizer",
    "mgvq_serve": ROOT / "serve/mgvq_serve",
}
MAX_LINES, MAX_MEDIAN, MAX_FUNCTION, MAX_SIGN = 400, 170, 60, 100
FORBIDDEN_NAMES = {"utils.py", "common.py", "helpers.py", "helper.py", "misc.py"}
LARGE_FILES = {  # over 250 kB, each with its reason
    "benchmarks/tiny_vlm/dense/model.safetensors": "the quantizer's test input",
    "benchmarks/tiny_vlm/dense/questions.zip": "5,000 unseen questions with their pictures",
    "benchmarks/tiny_vlm/dense/calibration.zip": "the calibration set of the demonstration model",
    "mgvq_runtime/assets/demo/model.safetensors": "the bundled 2-bit checkpoint",
    "mgvq_runtime/assets/demo/questions.zip": "the question set it is scored on",
}


def tracked(pattern: str = "") -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    return [ROOT / name for name in listed if name.endswith(pattern) and (ROOT / name).is_file()]


def sources() -> list[Path]:
    return [p for p in tracked(".py") if "tests" not in p.relative_to(ROOT).parts]


def test_source_files_are_short() -> None:
    lines = {p: len(p.read_text().splitlines()) for p in sources()}
    too_long = {str(p.relative_to(ROOT)): n for p, n in lines.items() if n > MAX_LINES}
    assert not too_long, f"over {MAX_LINES} lines, find the better seam: {too_long}"
    assert statistics.median(lines.values()) <= MAX_MEDIAN
    print(f"{len(lines)} source files, {sum(lines.values())} lines")


def test_functions_are_short() -> None:
    too_long = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name} {node.end_lineno - node.lineno + 1}"
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > MAX_FUNCTION
    ]
    assert not too_long, f"functions over {MAX_FUNCTION} lines: {too_long}"


def test_every_file_opens_with_a_sign() -> None:
    for path in tracked(".py"):
        source = path.read_text()
        if not source.strip():
            continue
        sign = ast.get_docstring(ast.parse(source))
        assert sign, f"{path.relative_to(ROOT)} has no module docstring"
        first = sign.splitlines()[0]
        assert len(first) <= MAX_SIGN, (
            f"{path.relative_to(ROOT)}: the sign's first line is too long"
        )


def test_importing_does_nothing() -> None:
    """All four packages import without triton, fastapi, transformers, numba or a CUDA context."""
    program = (
        "import sys\n"
        f"for name in {sorted(PACKAGES)}: __import__(name)\n"
        "heavy = {'torch', 'triton', 'fastapi', 'transformers', 'numba'} & set(sys.modules)\n"
        "sys.exit(f'imported {sorted(heavy)}' if heavy else 0)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_every_module_imports_without_a_gpu() -> None:
    program = (
        "import importlib, pkgutil, sys\n"
        f"for name in {sorted(PACKAGES)}:\n"
        "    package = importlib.import_module(name)\n"
        "    for module in pkgutil.walk_packages(package.__path__, name + '.'):\n"
        "        if '.triton' not in module.name and not module.name.endswith('__main__'):\n"
        "            importlib.import_module(module.name)\n"
        "import torch\n"
        "heavy = {'triton', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'imported {sorted(heavy)}' if heavy else torch.cuda.is_initialized())\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_front_doors_resolve(package: str) -> None:
    module = importlib.import_module(package)
    names = getattr(module, "__all__", [])  # a room without names of its own is its modules
    for name in names:
        assert getattr(module, name) is not None
    assert set(names) <= set(dir(module))


def test_no_package_marker_under_tests_or_in_source_roots() -> None:
    markers = list(tracked("__init__.py"))
    misplaced = [
        str(p.relative_to(ROOT))
        for p in markers
        if not any(p.is_relative_to(home) for home in PACKAGES.values())
    ]
    assert not misplaced, misplaced


def test_forbidden_names() -> None:
    assert not [p for p in tracked(".py") if p.name in FORBIDDEN_NAMES]


def test_every_op_has_its_reference_and_its_test() -> None:
    ops = importlib.import_module("mgvq_kernels.ops")
    reference = importlib.import_module("mgvq_kernels.reference")
    tests = "\n".join(p.read_text() for p in (ROOT / "tests/kernels").rglob("test_*.py"))
    for name in ops.OPS:
        assert hasattr(reference, name), f"{name} has no reference"
        assert re.search(rf"\b{name}\b", tests), f"{name} has no test"


def test_environment_is_read_in_one_place_and_documented() -> None:
    env = importlib.import_module("mgvq_runtime.env")
    page = (ROOT / "docs/environment.md").read_text()
    for name in re.findall(r"MGVQ_[A-Z_]+", Path(env.__file__).read_text()):
        assert f"`{name}`" in page, f"docs/environment.md does not name {name}"
    for path in sources():
        if any(path.is_relative_to(home) for home in PACKAGES.values()):
            assert path.name == "env.py" or "os.environ" not in path.read_text(), path


def test_large_files_have_a_reason_and_the_tree_can_travel() -> None:
    sizes = {str(p.relative_to(ROOT)): p.stat().st_size for p in tracked()}
    unexplained = {n: s for n, s in sizes.items() if s > 250_000 and n not in LARGE_FILES}
    assert not unexplained, f"over 250 kB without a reason: {unexplained}"
    assert max(sizes.values()) <= 32_000_000
    assert sum(sizes.values()) <= 50 * 1024**2


def test_version_matches_the_changelog() -> None:
    version = importlib.import_module("mgvq_runtime").__version__
    newest = re.search(r"^## \[?(\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert newest is not None
    assert newest.group(1) == version


def test_commands_exist() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    for target in scripts.values():
        module, function = target.split(":")
        assert callable(getattr(importlib.import_module(module), function))
