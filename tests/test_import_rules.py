"""Who may import whom, read off the sources."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STANDARD = set(sys.stdlib_module_names)


def imported(path: Path) -> dict[str, set[str]]:
    """Top-level names of the modules that a file imports: those at import time and those inside functions."""
    found: dict[str, set[str]] = {"top": set(), "inside": set()}
    tree = ast.parse(path.read_text())
    inside = {
        id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef) for n in ast.walk(f)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = {node.module or ""}
        else:
            continue
        found["inside" if id(node) in inside else "top"] |= names
    return found


def files(folder):
    return sorted((ROOT / folder).rglob("*.py"))


def everything(path):
    return set().union(*imported(path).values())


@pytest.mark.parametrize("path", files("triton_kernels"), ids=lambda p: p.name)
def test_triton_kernels_import_torch_and_triton_only(path):
    names = {n.split(".")[0] for n in everything(path)}
    assert names <= STANDARD | {"torch", "triton"}


@pytest.mark.parametrize("path", files("dass_ops"), ids=lambda p: p.name)
def test_dass_ops_imports_torch_and_itself(path):
    if "triton_kernels" in path.parts:
        pytest.skip("a link to triton_kernels, tested above")
    names = {n.split(".")[0] for n in everything(path)}
    assert names <= STANDARD | {"torch", "dass_ops"}
    assert "triton" not in {n.split(".")[0] for n in imported(path)["top"]}


@pytest.mark.parametrize("path", files("dass"), ids=lambda p: p.name)
def test_dass_uses_public_names_of_dass_ops(path):
    tree = ast.parse(path.read_text())
    import dass_ops

    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "dass_ops":
            assert node.module == "dass_ops", f"{path.name} reaches into {node.module}"
            assert {a.name for a in node.names} <= set(dass_ops.__all__)
        if isinstance(node, ast.Import):
            assert not any(a.name.startswith("dass_ops.") for a in node.names)


def test_no_bare_except_hides_a_missing_part():
    for folder in ("dass_ops", "dass", "triton_kernels", "benchmarks"):
        for path in files(folder):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ExceptHandler):
                    broad = node.type is None or (isinstance(node.type, ast.Name) and "Exception" in node.type.id)
                    silent = all(isinstance(n, ast.Pass) for n in node.body)
                    assert not (broad and silent), f"{path}:{node.lineno} swallows every error"


def test_kernels_are_free_of_torch():
    allowed = re.compile(r'#include\s+(<(?!torch|ATen|c10)[^>]+>|<torch/headeronly/[^>]+>|"[^"]+")')
    paths = [ROOT / "csrc" / "arguments.h", *sorted((ROOT / "csrc" / "kernels").glob("*"))]
    for path in paths:
        for line in path.read_text().splitlines():
            if line.startswith("#include"):
                assert allowed.match(line) and "ATen" not in line, f"{path.name}: {line}"


def test_import_is_light():
    """`import dass` and `import dass_ops` load none of the libraries that only some commands need."""
    heavy = ("triton", "sklearn", "matplotlib", "transformers", "torchaudio", "tyro", "scipy")
    code = f"import sys, dass, dass_ops; print(*[m for m in {heavy!r} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


def test_no_atomics_in_kernels():
    for path in [*(ROOT / "csrc").rglob("*.cu*"), *(ROOT / "csrc").rglob("*.h"), *files("triton_kernels")]:
        assert not re.search(r"\batomic_?[aA]dd|tl\.atomic", path.read_text()), path
