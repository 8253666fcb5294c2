"""The arrows of docs/architecture.md: a module imports from its own layer or from one below, never from above."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "multihead"
LAYERS: list[set[str]] = [
    {"errors", "__version__"},
    {"transformer", "codec", "data", "metrics", "run", "serve.settings", "strict_yaml"},
    {"recipe", "starting", "explain", "generation", "runtime", "weights"},
    {"task"},
    {"tasks"},
    {
        "dealing",
        "prepare",
        "build",
        "costing",
        "train",
        "evaluate",
        "keeping",
        "stepping",
        "validating",
        "proving",
        "export_gguf",
        "export_images",
        "export_sounds",
        "export",
        "predict",
        "report",
        "charts",
        "card",
        "init",
        "serve",
        "serving",
        "demo",
    },
    {"cli"},
    {"", "__main__"},
]


def layer(module: str) -> int:
    """Height of ``multihead.<module>``: by its full name, else by its first part."""
    for name in (module, module.split(".")[0]):
        for height, names in enumerate(LAYERS):
            if name in names:
                return height
    raise AssertionError(f"multihead.{module} has no layer: give it one here and in docs/architecture.md")


def imports(path: Path) -> set[str]:
    """Every ``multihead`` module that a file imports, at any depth, under names below the package."""
    found = set()
    package = ["multihead", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            name = ".".join(part for part in (base, node.module or "") if part)
            found |= {
                f"{name}.{a.name}" if (PACKAGE.parent / name.replace(".", "/")).is_dir() else name for a in node.names
            }
    return {name.removeprefix("multihead").removeprefix(".") for name in found if name.split(".")[0] == "multihead"}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    own = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix(".")
    if own:
        upward = {name for name in imports(path) if name and layer(name) > layer(own)}
        assert not upward, f"multihead.{own} imports from above: {upward}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "transformer").glob("*.py")), ids=lambda p: p.name)
def test_the_transformer_imports_torch_alone(path: Path) -> None:
    allowed = {"torch", "multihead", *sys.stdlib_module_names}
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        names = (
            [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
        assert {n.split(".")[0] for n in names} <= allowed


@pytest.mark.parametrize("step", ["prepare", "build", "train", "evaluate", "predict"])
def test_no_step_imports_a_task(step: str) -> None:
    assert not {name for name in imports(PACKAGE / f"{step}.py") if name.startswith("tasks")}


def test_nothing_unpickles() -> None:
    forbidden = {
        ("torch", "load"),
        ("pickle", "load"),
        ("pickle", "loads"),
        ("yaml", "unsafe_load"),
        ("yaml", "full_load"),
    }
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in forbidden, f"{path}:{node.lineno}"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec"), f"{path}:{node.lineno}"


def test_importing_multihead_loads_no_torch() -> None:
    code = "import sys, multihead, multihead.cli; sys.exit('torch' in sys.modules or 'pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
