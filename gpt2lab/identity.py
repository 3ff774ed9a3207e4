"""Run identity: the hash of everything that can change a run's weights, and of nothing else.

The code's part is computed from definitions, not from files: starting from what trains (ROOTS) and the chosen
components, every function, class and constant that is reached within the package or a plug-in. So editing one component
retrains exactly the arms that use it, and editing a comment, a docstring or a report retrains nothing.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from gpt2lab.registry import SLOTS, Choice

ROOTS = (
    ("gpt2lab.model", "build_model"),
    ("gpt2lab.data.batches", "Batches"),
    ("gpt2lab.optim.groups", "build_optimizers"),
    ("gpt2lab.training.loop", "steps"),
)
# what these say or look up cannot change a weight: the resolved config already holds every choice they made
BESIDE = ("gpt2lab.errors", "gpt2lab.schema", "gpt2lab.registry", "gpt2lab.store")
# settings of a config that cannot change a weight; the data's part is its fingerprint, the device's its type
NOT_TRAINING = ("evaluation", "scale", "data")
NOT_WEIGHTS = ("device", "threads", "log_every_steps", "checkpoint_every_steps")

Definition = tuple[str, str]
PLUGIN = re.compile(r"^gpt2lab_plugin_\w+")  # such a module is named by its file's path, which does not count


@dataclass(frozen=True)
class Module:
    """A parsed source file: top-level definitions by name, and what each imported name stands for."""

    definitions: Mapping[str, ast.stmt]
    imports: Mapping[str, tuple[str, str | None]]


@lru_cache(maxsize=256)
def parse(name: str) -> Module:
    """The module `name` of this package or a loaded plug-in."""
    module = sys.modules.get(name) or __import__(name, fromlist=["_"])
    tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
    definitions: dict[str, ast.stmt] = {}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            definitions[node.name] = node
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                definitions |= {n.id: node for n in ast.walk(target) if isinstance(n, ast.Name)}
    return Module(definitions, dict(_imports(tree.body)))


def _imports(body: Iterable[ast.AST]) -> Iterator[tuple[str, tuple[str, str | None]]]:
    """Names that import statements bind to something of ours: alias -> (module, name in it or None)."""
    for node in body:
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                yield alias.asname or alias.name, (node.module, alias.name)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.asname:
                    yield alias.asname, (alias.name, None)


def reached(roots: Iterable[Definition]) -> dict[str, str]:
    """Every definition that `roots` lead to -> its normalised text, by `module:name`."""
    found: dict[str, str] = {}
    todo = list(roots)
    while todo:
        module, name = todo.pop()
        key = f"{module}:{name}"
        if key in found or module in BESIDE or module.startswith(tuple(f"{m}." for m in BESIDE)):
            continue
        source = parse(module)
        if name not in source.definitions:
            if name in source.imports and _ours(source.imports[name][0]):  # re-exported
                where, what = source.imports[name]
                todo.append((where, what or name))
            continue
        node = bare(source.definitions[name])
        found[key] = ast.unparse(node)
        todo += _mentions(node, module, source)
    return found


def bare(node: ast.stmt) -> ast.stmt:
    """A copy without docstrings and without the decorators that register components."""
    copy: ast.stmt = ast.parse(ast.unparse(node)).body[0]
    for inner in ast.walk(copy):
        if not isinstance(inner, (ast.FunctionDef, ast.ClassDef)):
            continue
        inner.decorator_list = [d for d in inner.decorator_list if not _registers(d)]
        first = inner.body[0]
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            inner.body = inner.body[1:] or [ast.Pass()]
    return copy


def _registers(decorator: ast.expr) -> bool:
    return (
        isinstance(decorator, ast.Call)
        and isinstance(decorator.func, ast.Attribute)
        and decorator.func.attr == "register"
    )


def _mentions(node: ast.AST, module: str, source: Module) -> Iterator[Definition]:
    """What `node` mentions of this module or of modules of ours."""
    imports = {**source.imports, **dict(_imports(ast.walk(node)))}
    for inner in ast.walk(node):
        if isinstance(inner, ast.Name):
            if inner.id in source.definitions:
                yield module, inner.id
            elif inner.id in imports and imports[inner.id][1] and _ours(imports[inner.id][0]):
                yield imports[inner.id][0], str(imports[inner.id][1])
        elif isinstance(inner, ast.Attribute) and isinstance(inner.value, ast.Name):
            where = imports.get(inner.value.id)
            if where and _ours(where[0]):  # `module.name`
                full = where[0] if where[1] is None else f"{where[0]}.{where[1]}"
                if full in sys.modules:
                    yield full, inner.attr


def _ours(module: str) -> bool:
    return module.split(".")[0] == "gpt2lab" or module.startswith("gpt2lab_plugin_")


def digest(value: object) -> str:
    """sha256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def core_code() -> str:
    """Hash of what trains every model, whatever its components."""
    return digest(reached(ROOTS))


def component_code(choice: Choice) -> str:
    """Hash of one component's definition and of what it reaches beyond the core."""
    factory = SLOTS[choice.slot][choice.name].factory
    core = _core_keys()
    found = reached([(factory.__module__, factory.__name__)])
    return digest({PLUGIN.sub("plugin", k): v for k, v in found.items() if k not in core})


@lru_cache(maxsize=1)
def _core_keys() -> frozenset[str]:
    return frozenset(reached(ROOTS))


def settings(config: Any) -> dict[str, Any]:
    """The part of a config that can change weights, with every option of every component."""
    tree: dict[str, Any] = {}
    for section, value in config:
        if section in NOT_TRAINING or section in ("seed", "repeat"):
            continue
        tree[section] = {k: _plain(v) for k, v in value if k not in NOT_WEIGHTS}
    return tree


def _plain(value: Any) -> Any:
    if isinstance(value, Choice):
        return value.full()
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def choices(config: Any) -> list[Choice]:
    """Every component that takes part in training."""
    found: list[Choice] = []
    for section in ("model", "optim"):
        for _, value in getattr(config, section):
            found += [v for v in (value if isinstance(value, tuple) else (value,)) if isinstance(v, Choice)]
    return list(dict.fromkeys(found))


def run_identity(config: Any, *, data: str, device: str, threads: int, torch_version: str) -> dict[str, Any]:
    """The parts of a run's identity; two runs with equal parts are the same run.

    data: fingerprint of the prepared data. device: its type. threads: CPU threads (they change the last bits of sums).
    """
    return {
        "settings": settings(config),
        "seed": config.seed,
        "repeat": config.repeat,
        "data": data,
        "torch": torch_version,
        "device": device,
        "threads": threads,
        "core": core_code(),
        "components": {f"{c.slot}={c.name}": component_code(c) for c in choices(config)},
    }


def run_id(identity: Mapping[str, Any]) -> str:
    """16 hexadecimal digits of the identity's hash."""
    return digest(identity)[:16]
