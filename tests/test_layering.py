"""The layering rule: a module imports lower layers or its own package, and imports inside functions count."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "gpt2lab"

# lowest first; those in one set may not import each other
LAYERS: list[set[str]] = [
    {"errors"},
    {"faults"},
    {"schema", "text", "records", "events"},
    {"registry", "store", "analysis"},
    {"components", "tracking", "results"},
    {"model", "data", "optim", "training", "evidence", "ladder", "health", "origins", "published"},
    {"costs", "generation", "peak", "trace"},
    {"evaluation", "pretrained"},
    {"reading", "clashes", "config"},
    {"testing", "identity", "coordinates"},
    {"planning"},
    {"runner"},
    {"reuse"},
    {"trained", "doctor"},
    {"executors", "exam", "lm_eval"},
    {"display"},
    {"sweep"},
    {"experiments"},
    {"report"},
    {"api"},
    {"cli"},
    {"__main__"},
]
SAME_LAYER_MAY = [{"reading", "clashes", "config"}, {"evidence", "ladder"}]  # one concern in files
WITHIN: dict[str, list[set[str]]] = {
    "planning": [
        {"designs"},
        {"space", "machine", "history"},
        {"samplers"},
        {"declaration"},
        {"arms"},
        {"runs"},
        {"search"},
        {"tune"},
        {"ablation"},
        {"noise", "equalise", "throughput"},
        {"bracket", "budgets", "scope", "microbatch"},
        {"plan"},
        {"record", "forecast", "repeats"},
    ],
    "reuse": [{"why"}, {"adopt", "measure"}],
    "doctor": [{"run", "machine"}, {"checks"}],
    "reading": [{"source"}, {"fitting", "layers"}],
}  # the same within packages that have an order of their own
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
WITHOUT_TORCH = (
    "store", "analysis", "tracking", "report", "registry", "schema", "errors", "reading", "display", "results", "text",
    "evidence", "ladder", "health", "origins", "published",
)  # fmt: skip


def files() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def owner(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imported(path: Path) -> Iterator[str]:
    """Names of our packages and modules that a file imports anywhere."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "gpt2lab":
            parts = node.module.split(".")
            yield from [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("gpt2lab."))


def neighbours(path: Path, package: str) -> set[str]:
    """Modules of its own package that a file imports."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.ImportFrom)]
    inside = [
        (node.module or "").split(".")[2:] or [a.name for a in node.names]
        for node in nodes
        if (node.module or "").split(".")[:2] == ["gpt2lab", package]
    ]
    return {names[0] for names in inside}


def test_every_module_has_a_layer() -> None:
    assert {owner(path) for path in files()} <= RANK.keys()


def test_benchmarks_stay_outside() -> None:
    texts = {path: path.read_text(encoding="utf-8") for path in files()}
    assert not [
        path for path, text in texts.items() if re.search(r"^\s*(from|import) benchmarks\b", text, re.MULTILINE)
    ]


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    ours = owner(path)
    for other in set(imported(path)) - {ours}:
        together = any({ours, other} <= group for group in SAME_LAYER_MAY)
        assert RANK[other] < RANK[ours] or together, f"{path.name} ({ours}) imports {other}, which is not below it"


@pytest.mark.parametrize("package", WITHIN)
def test_imports_within_a_package_point_down(package: str) -> None:
    rank = {name: rank for rank, names in enumerate(WITHIN[package]) for name in names}
    modules = {path.stem: path for path in files() if owner(path) == package and path.stem != "__init__"}
    assert modules.keys() == rank.keys()
    for name, path in modules.items():
        for other in neighbours(path, package) - {name}:
            assert rank[other] < rank[name], f"{package}/{name}.py imports {other}, which is not below it"


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_what_needs_no_torch_imports_none(name: str) -> None:
    modules = [
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        for path in files()
        if owner(path) == name
    ]
    code = f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_only_the_mirror_and_the_reader_of_experiments_import_mlflow() -> None:
    users = {
        str(path.relative_to(PACKAGE))
        for path in files()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "mlflow")
        or (isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "mlflow" for alias in node.names))
    }
    assert users == {"tracking/mlflow.py", "tracking/connection.py", "tracking/experiments.py"}
