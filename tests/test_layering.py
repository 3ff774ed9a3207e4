"""The layering rule: a module imports its own layer and lower ones, never in a circle. Imports in functions count."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "gpt2lab"
LAYERS: list[set[str]] = [
    {"errors", "basics", "schema", "records"},
    {"registry", "identity", "store", "analysis"},
    {"components", "data", "tracking"},
    {"model", "optim", "training"},
    {"evaluation", "generation", "inspection", "pretrained"},
    {"config"},
    {"planning", "testing", "reports"},
    {"runner", "worker", "executors", "reuse", "doctor"},
    {"sweep", "experiments"},
    {"api", "cli", "__main__"},
]  # lowest first
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
WITHOUT_TORCH = (
    "store", "analysis", "tracking", "reports", "registry", "schema", "errors", "config.source", "config.fitting",
    "records", "basics",
)  # fmt: skip


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"}
TREES = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in FILES.items()}


def layer(module: str) -> int:
    return RANK[module.split(".")[1]]


def executed(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below one, except those that only type checkers see."""
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)):
            yield child
            yield from executed(child)


def imports(module: str) -> Iterator[str]:
    """Our modules that one imports when it runs, except those that it imports only to fill slots."""
    for node in executed(TREES[module]):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from {f"{node.module}.{alias.name}" for alias in node.names} & FILES.keys() or {node.module}


def names_imported(module: str) -> Iterator[str]:
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_every_module_has_a_layer() -> None:
    assert {module.split(".")[1] for module in FILES} == RANK.keys()


@pytest.mark.parametrize("module", FILES)
def test_imports_point_down(module: str) -> None:
    ours = {name for name in names_imported(module) if name.startswith("gpt2lab.") and name.split(".")[1] in RANK}
    above = sorted(name for name in ours if layer(name) > layer(module))
    assert not above, f"{module} imports {above}, which are above it"
    assert not [name for name in names_imported(module) if name.split(".")[0] == "benchmarks"]


def test_imports_form_no_circle() -> None:
    TopologicalSorter({module: set(imports(module)) & FILES.keys() - {module} for module in FILES}).prepare()


def test_what_needs_no_torch_imports_none() -> None:
    chosen = [
        module for module in FILES if re.match(rf"gpt2lab\.({'|'.join(map(re.escape, WITHOUT_TORCH))})\b", module)
    ]
    assert all(any(module.startswith(f"gpt2lab.{name}") for module in chosen) for name in WITHOUT_TORCH)
    code = f"import importlib, sys\nfor name in {chosen}:\n    importlib.import_module(name)\n"
    code += "    if 'torch' in sys.modules: sys.exit(f'{name} imports torch')"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_only_the_tracker_of_mlflow_imports_it() -> None:
    users = [module for module in FILES if "mlflow" in {name.split(".")[0] for name in names_imported(module)}]
    assert users == ["gpt2lab.tracking.mlflow"]
