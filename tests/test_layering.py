"""The layering rule: a module imports lower layers or its own package, and imports inside functions count."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "gpt2lab"

# lowest first; those in one set may not import each other
LAYERS: list[set[str]] = [
    {"redaction"},
    {"errors"},
    {"faults"},
    {"schema", "text", "records", "output", "signals", "cores", "shipped"},
    {"registry", "store", "analysis", "progress"},
    {"components", "tracking", "results"},
    {"model", "data", "optim", "training"},
    {"costs", "generation", "trace", "lens", "pretrained"},
    {"evaluation"},
    {"config"},
    {"testing", "identity"},
    {"planning"},
    {"runner"},
    {"worker"},
    {"reuse"},
    {"pretrained.load", "doctor"},
    {"executors", "evaluation.runs", "evaluation.lm_eval"},
    {"sweep"},
    {"experiments"},
    {"reports"},
    {"api"},
    {"cli"},
    {"__main__"},
]
SAME_LAYER_MAY: list[set[str]] = []
WITHIN: dict[str, list[set[str]]] = {
    "planning": [
        {"placebo", "space", "machine"},
        {"declaration"},
        {"ablation"},
        {"runs"},
        {"tuning"},
        {"noise", "probes"},
        {"equalise", "scope"},
        {"plan"},
        {"record", "forecast", "prediction"},
    ],
    "reuse": [{"why"}, {"adopt", "measure"}],
    "doctor": [{"machine", "checks"}],
    "config": [{"source"}, {"fitting", "editor"}, {"config"}],
}  # the same within packages that have an order of their own
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
WITHOUT_TORCH = (
    "store", "analysis", "tracking", "reports", "registry", "schema", "errors", "config.source", "config.fitting",
    "results", "text", "records", "progress",
)  # fmt: skip


def files() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def layered(parts: Sequence[str]) -> str:
    """The module with a layer of its own, or else the package or module of the root that `parts` lie in."""
    return next((name for name in (".".join(parts[:2]), parts[0]) if name in RANK), parts[0])


def owner(path: Path) -> str:
    return layered(path.relative_to(PACKAGE).with_suffix("").parts)


def imported(path: Path) -> Iterator[str]:
    """Names of our packages and modules that a file imports anywhere."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "gpt2lab":
            yield from (layered([*node.module.split(".")[1:], alias.name]) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (layered(alias.name.split(".")[1:]) for alias in node.names if alias.name.startswith("gpt2lab."))


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
    paths = [path for path in files() if owner(path) == name] or [PACKAGE / f"{name.replace('.', '/')}.py"]
    modules = [".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in paths]
    modules = [module.removesuffix(".__init__") for module in modules]
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
    assert users == {"tracking/mlflow.py"}
