"""Run identity: the hash of everything that can change a run's weights, and nothing else.

The hash of the code is over definitions, not files: every function, class and constant that ROOTS and the chosen
components reach within the package or a plug-in. So editing a component retrains exactly the arms that use it, and
editing a comment, a docstring or a report retrains nothing.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from gpt2lab.registry import SLOTS, Choice

ROOTS = (
    ("gpt2lab.model", "build_model"),
    ("gpt2lab.data.batches", "Batches"),
    ("gpt2lab.optim.groups", "build_optimizers"),
    ("gpt2lab.training.loop", "steps"),
)
# modules that cannot change a weight: the resolved config contains all of their results
EXCLUDED = (
    "gpt2lab.errors", "gpt2lab.schema", "gpt2lab.registry", "gpt2lab.store", "gpt2lab.basics.faults",
    "gpt2lab.training.clock", "gpt2lab.training.diagnostics",
)  # fmt: skip
# settings that cannot change a weight; data is represented by its fingerprint, the device by its type
NOT_TRAINING = ("evaluation", "scale", "data")
NOT_WEIGHTS = (
    "device", "threads", "log_every_steps", "checkpoint_every_steps", "keep_checkpoints", "keep_best",
    "milestone_every_steps", "rank_timeout_seconds", "compile",
)  # fmt: skip

PART_NAMES = {
    "seed": "seed", "repeat": "repeat of the seed", "data": "prepared data (fingerprint)", "torch": "torch version",
    "device": "device", "threads": "CPU threads", "compiled": "compiled by torch.compile",
}  # fmt: skip
"""Parts of an identity -> what messages call them."""

Definition = tuple[str, str]
PLUGIN = re.compile(
    r"^gpt2lab_plugin_[^:]+"
)  # module names of plug-in files contain their path, which is not part of the hash
Function = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


@dataclass(frozen=True)
class Module:
    """A parsed source file. `definitions`: name -> the top-level statements that bind or change it. `imports`: name ->
    (module, name in it, or None for the module itself). `stars`: modules of which all names were imported. `known`: of
    definitions that were reached already, their normalised text and what they mention."""

    definitions: Mapping[str, list[ast.stmt]]
    imports: Mapping[str, tuple[str, str | None]]
    stars: tuple[str, ...]
    known: dict[str, tuple[str, list[Definition]]] = field(default_factory=dict)


@cache
def parse(name: str) -> Module:
    """The module `name`; one that cannot be imported, or has no Python source, defines nothing."""
    try:
        module = sys.modules.get(name) or importlib.import_module(name)
    except ImportError:
        return Module({}, {}, ())
    file = Path(module.__file__ or "")
    if file.suffix != ".py":
        return Module({}, {}, ())
    tree = ast.parse(file.read_bytes())
    definitions: dict[str, list[ast.stmt]] = {}
    for node in tree.body:
        for bound in dict.fromkeys([node.name] if isinstance(node, Function) else _changed(node)):
            definitions.setdefault(bound, []).append(node)
    outside = (inner for node in tree.body if not _is_hidden(node) for inner in ast.walk(node))
    imports = list(_imports(outside, str(module.__package__)))
    stars = tuple(where for alias, (where, _) in imports if alias == "*")
    return Module(definitions, {alias: origin for alias, origin in imports if alias != "*"}, stars)


def _is_hidden(node: ast.stmt) -> bool:
    """Whether imports inside are not the module's: a function's own, and those that only type checkers see."""
    return isinstance(node, Function) or (isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"))


def _changed(statement: ast.stmt) -> Iterator[str]:
    """Names that a top-level statement binds (`A = 1`, `for a in b`) or changes (`A[0] = 1`, `A += b`, `A.add(b)`)."""
    for node in ast.walk(statement):
        if isinstance(node, Function):
            yield node.name
        elif isinstance(node, (ast.Name, ast.Attribute, ast.Subscript)) and isinstance(node.ctx, ast.Store):
            yield _root(node)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            yield _root(node.value.func)


def _root(node: ast.expr) -> str:
    """`A` of `A.b[0].c`; empty for what does not start with a name."""
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def _imports(nodes: Iterable[ast.AST], package: str) -> Iterator[tuple[str, tuple[str, str | None]]]:
    """Names that import statements bind -> (module, name in it or None)."""
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            where = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                yield alias.asname or alias.name, (where, alias.name)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.split(".")[0]  # `import a.b` binds a
                yield alias.asname or first, (alias.name if alias.asname else first, None)


@dataclass(frozen=True)
class CodeScope:
    """Modules whose code counts: this package, the packages of the roots, and modules in the folder of a plug-in."""

    packages: frozenset[str]
    folders: frozenset[Path]

    @classmethod
    def of(cls, roots: Iterable[Definition]) -> CodeScope:
        """The scope of `roots`."""
        modules = {module for module, _ in roots}
        plugins = (sys.modules[module] for module in modules if PLUGIN.match(module))
        return cls(
            frozenset({"gpt2lab", *(module.split(".")[0] for module in modules)}),
            frozenset(Path(str(plugin.__file__)).parent for plugin in plugins),
        )

    def __contains__(self, module: str) -> bool:
        if module in EXCLUDED or module.startswith(tuple(f"{m}." for m in EXCLUDED)):
            return False
        first = module.split(".")[0]
        if first in self.packages:
            return True
        file = getattr(sys.modules.get(first), "__file__", None)
        if not file or not self.folders:
            return False
        path = Path(file).resolve()
        return (path.parent.parent if path.stem == "__init__" else path.parent) in self.folders


def reached(roots: Iterable[Definition]) -> dict[str, str]:
    """`module:name` of every definition that `roots` reach -> its normalised text."""
    todo = list(roots)
    scope = CodeScope.of(todo)
    texts: dict[str, str] = {}
    visited: set[Definition] = set()
    while todo:
        module, name = todo.pop()
        if (module, name) in visited or module not in scope:
            continue
        visited.add((module, name))
        source = parse(module)
        if name in source.definitions:
            if name not in source.known:
                nodes = [bare(node) for node in source.definitions[name]]
                mentions = [mention for node in nodes for mention in _mentions(node, module, source)]
                source.known[name] = "\n".join(ast.unparse(Quoted().visit(node)) for node in nodes), mentions
            texts[f"{module}:{name}"], mentions = source.known[name]
            todo += mentions
        elif name in source.imports:  # re-exported
            where, original = source.imports[name]
            todo.append((where, original or name))
        else:
            todo += [(star, name) for star in source.stars]
    return texts


def bare(node: ast.stmt) -> ast.stmt:
    """A copy without docstrings (also those of attributes) and without the decorators that register components."""
    copy: ast.stmt = ast.parse(ast.unparse(node)).body[0]
    for inner in ast.walk(copy):
        if isinstance(inner, Function):
            inner.decorator_list = [d for d in inner.decorator_list if not _registers(d)]
            inner.body = [part for part in inner.body if not _is_text(part)] or [ast.Pass()]
    return copy


class Quoted(ast.NodeTransformer):
    """f-strings as Python 3.11 unparses them. Later versions quote them in another way, which may not change an id."""

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.Name:
        quotes, text = ["'", '"', '"""', "'''"], ""
        for value in node.values:
            part = self.part(value)
            if isinstance(value, ast.Constant):
                part = "".join(c if c.isprintable() and c != "\\" else repr(c)[1:-1] for c in part)
            quotes = [q for q in quotes if q not in part and (len(q) == 3 or "\n" not in part)] or quotes[-1:]
            quotes.sort(key=lambda q: q[0] == part[-1:])
            text += part
        return ast.Name(f"f{quotes[0]}{text}{quotes[0]}")  # as a name it is written as it is

    def part(self, node: ast.expr) -> str:
        if isinstance(node, ast.Constant):
            return str(node.value).replace("{", "{{").replace("}", "}}")
        if isinstance(node, ast.JoinedStr):  # a format
            return "".join(map(self.part, node.values))
        assert isinstance(node, ast.FormattedValue)
        # with parentheses where they are needed: a conditional needs the same ones
        value = ast.unparse(ast.IfExp(ast.Name("_"), self.visit(node.value), ast.Name("_"))).removesuffix(
            " if _ else _"
        )
        conversion = f"!{chr(node.conversion)}" if node.conversion != -1 else ""
        form = f":{self.part(node.format_spec)}" if node.format_spec else ""
        return "{" + " " * value.startswith("{") + value + conversion + form + "}"


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _registers(decorator: ast.expr) -> bool:
    return (
        isinstance(decorator, ast.Call)
        and isinstance(decorator.func, ast.Attribute)
        and decorator.func.attr == "register"
    )


def _mentions(node: ast.AST, module: str, source: Module) -> Iterator[Definition]:
    """Definitions of its own module and of imported ones that `node` mentions."""
    package = str(sys.modules[module].__package__)
    inside = list(_imports(ast.walk(node), package))
    imports = {**source.imports, **dict(inside)}
    stars = (*source.stars, *(where for alias, (where, _) in inside if alias == "*"))
    for inner in ast.walk(node):
        first, *rest = _words(inner)
        if first in source.definitions:
            yield module, first
        elif first in imports:
            where, name = imports[first]
            yield from _split(where, [name, *rest] if name else rest)
        elif first:
            yield from ((star, first) for star in stars)


def _words(node: ast.AST) -> list[str]:
    """`a.b.c` as a list of names; one empty string for other expressions."""
    words: list[str] = []
    while isinstance(node, ast.Attribute):
        words.append(node.attr)
        node = node.value
    return [node.id, *reversed(words)] if isinstance(node, ast.Name) else [""]


def _split(module: str, names: Sequence[str]) -> Iterator[Definition]:
    """`module` and the names after it as (module, name), with the deepest loaded submodule."""
    for count in range(len(names) - 1, 0, -1):
        deeper = ".".join([module, *names[:count]])
        if deeper in sys.modules:
            yield deeper, names[count]
            return
    if names:
        yield module, names[0]


def digest(value: object) -> str:
    """sha256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def core_code() -> str:
    """Hash of the code that trains every model, independent of components."""
    return digest(_core())


@cache
def _core() -> dict[str, str]:
    return reached(ROOTS)


def component_code(choice: Choice) -> str:
    """Hash of one component's definition and of what it reaches beyond the core."""
    return _factory_code(SLOTS[choice.slot][choice.name].factory)


def sources(config: Any) -> dict[str, dict[str, str]]:
    """The sources behind the code hashes of a config's identity: hash -> definition -> normalised source."""
    parts = [_core(), *(_factory_parts(SLOTS[choice.slot][choice.name].factory) for choice in choices(config))]
    return {digest(part): dict(part) for part in parts}


@cache
def _factory_code(factory: Callable[..., Any]) -> str:
    return digest(_factory_parts(factory))


@cache
def _factory_parts(factory: Callable[..., Any]) -> dict[str, str]:
    """Definitions behind a factory; of its whole module where it has no top-level definition (made in a loop, say)."""
    module, name = factory.__module__, factory.__name__
    definitions = parse(module).definitions
    whole = factory.__qualname__ != name or name not in definitions
    texts = reached([(module, definition) for definition in definitions] if whole else [(module, name)])
    return {PLUGIN.sub("plugin", k): v for k, v in texts.items() if k not in _core()}


def settings(config: Any) -> dict[str, Any]:
    """The part of a config that can change weights, with every option of every component."""
    tree: dict[str, Any] = {}
    for section, value in config:
        if section in NOT_TRAINING or section in ("seed", "repeat"):
            continue
        if section in ("branch", "branch_takes"):  # the id of a run, or a digest, identifies the weights
            tree |= {section: value.rpartition("#")[2]} if value not in (None, "all") else {}
            continue
        tree[section] = {k: plain(v) for k, v in value if k not in NOT_WEIGHTS and (k != "freeze" or v)}
    # all else about the data is in its fingerprint; without parts, runs keep the ids from before there were any
    return tree | ({"data": {"batches": plain(config.data.batches)}} if config.data.batches else {})


def plain(value: Any) -> Any:
    """A setting as plain data, with every option of every component."""
    if isinstance(value, Choice):
        return value.full()
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def choices(config: Any) -> list[Choice]:
    """Every component that affects training."""
    components: list[Choice] = []
    for section in ("model", "optim"):
        for _, value in getattr(config, section):
            components += [v for v in (value if isinstance(value, tuple) else (value,)) if isinstance(v, Choice)]
    return list(dict.fromkeys([*components, *config.data.batches]))


def run_identity(
    config: Any, *, data: str, device: str, threads: int, torch_version: str, compiled: bool = False
) -> dict[str, Any]:
    """The parts of a run's identity; two runs with equal parts are the same run.

    data: fingerprint of the prepared data. device: its type. threads: CPU threads. compiled: whether torch.compile
    compiles the model. The last two change rounding.
    """
    return {
        "settings": settings(config),
        "seed": config.seed,
        "repeat": config.repeat,
        "data": data,
        "torch": torch_version,
        "device": device,
        "threads": threads,
        "compiled": compiled,
        "core": core_code(),
        "components": {f"{c.slot}={c.name}": component_code(c) for c in choices(config)},
    }


def run_id(identity: Mapping[str, Any]) -> str:
    """16 hexadecimal digits of the identity's hash."""
    return digest(identity)[:16]
