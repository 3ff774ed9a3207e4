"""Slots: the swappable places, and the components that fit them. Knows nothing of torch.

    @norm.register("rmsnorm", source="arXiv:1910.07467")
    def rmsnorm(builder: Builder, *, eps: float = 1e-5) -> nn.Module:
        "Divide by the root mean square over channels.  (B, T, C) -> (B, T, C)."

A component is one function or class and one YAML name. Its positional parameters are what the slot hands over when it
builds; its keyword-only parameters are its options: names, types and defaults come from the signature alone. Registered
means listed, explained, validated and contract-tested.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import os
import sys
import traceback
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic_core import PydanticCustomError

from gpt2lab.basics.shipped import found
from gpt2lab.basics.signals import Stopped
from gpt2lab.errors import ConfigError, Problem, unknown
from gpt2lab.schema import convert, schema_of, type_name

ENTRY_POINTS = "gpt2lab.components"
BUG = "bug"
"""The tag of a component that is a mistake on purpose."""
Check = Callable[..., list[str]]
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Choice:
    """One component picked for a slot, with every option resolved to its final value."""

    slot: str
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def written(self) -> str | dict[str, Any]:
        """The shortest YAML form: the bare name, or name and the options that differ from their defaults."""
        defaults = (SLOTS.get(self.slot) or BESIDE_CONFIG[self.slot])[self.name].defaults()
        changed = {k: v for k, v in self.options.items() if v != defaults.get(k, ...)}
        return {"name": self.name, **changed} if changed else self.name

    def full(self) -> dict[str, Any]:
        """Name and every option: what identity is computed from."""
        return {"name": self.name, **self.options}

    def __hash__(self) -> int:
        return hash((self.slot, self.name, repr(sorted(self.options.items()))))

    def __str__(self) -> str:
        written = self.written()
        if isinstance(written, str):
            return written
        options = ", ".join(f"{k}={v}" for k, v in written.items() if k != "name")
        return f"{self.name}({options})"


@dataclass(frozen=True)
class Component:
    """One registered function or class: what it is called, where it comes from, what it can do and needs."""

    slot: str
    name: str
    factory: Callable[..., Any]
    source: str
    can: frozenset[str]
    needs: Mapping[str, str]
    check: Check | None
    examples: tuple[Mapping[str, Any], ...] = ()
    tags: frozenset[str] = frozenset()

    @cached_property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """The options: keyword-only parameters, with annotations resolved to types."""
        parameters = inspect.signature(self.factory, eval_str=True).parameters
        return {name: p for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}

    def defaults(self) -> dict[str, Any]:
        """Options that have a default, with it."""
        return {n: p.default for n, p in self.parameters.items() if p.default is not p.empty}

    @property
    def doc(self) -> str:
        """The whole docstring, dedented."""
        return inspect.getdoc(self.factory) or ""

    @property
    def summary(self) -> str:
        """The docstring's first line."""
        return self.doc.partition("\n")[0]

    def json_schema(self) -> dict[str, Any]:
        """JSON Schema of this component written as a mapping."""
        options = {name: schema_of(parameter.annotation) for name, parameter in self.parameters.items()}
        for name, default in self.defaults().items():
            options[name]["default"] = default
        return {
            "type": "object", "description": self.summary, "additionalProperties": False,
            "properties": {"name": {"const": self.name}, **options},
            "required": ["name", *(name for name in options if name not in self.defaults())],
        }  # fmt: skip

    def options_from(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """`given`, converted and completed with defaults; raises a ValueError that carries every problem."""
        problems: list[tuple[str, str]] = []
        options: dict[str, Any] = {}
        parameters = self.parameters
        for key in given.keys() - parameters.keys():
            problems.append((key, unknown(f"option of {self.slot} {self.name}", key, parameters)))
        for key, parameter in parameters.items():
            if key in given:
                try:
                    options[key] = convert(given[key], parameter.annotation)
                except ValueError as error:
                    problems.append((key, str(error)))
            elif parameter.default is parameter.empty:
                wanted = type_name(parameter.annotation)
                problems.append(("", f"{self.slot} {self.name} needs the option '{key}' ({wanted})"))
            else:
                options[key] = parameter.default
        if problems:
            raise Misfit(problems)
        return options


class Misfit(ValueError):
    """Why a written choice fits no component: pairs of (key below the slot, sentence)."""

    def __init__(self, problems: Sequence[tuple[str, str]]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(what for _, what in self.problems))


Arity = Literal["one", "per_layer", "list"]


class Slot:
    """A swappable place in GPT-2 or its training.

    `path` is its key in a config (`model.norm`). `arity`: `one` choice; `per_layer`, one choice or a pattern repeated
    over the layers; `list`, an ordered list whose parts add up. `default` is what canonical GPT-2 has. `base` is the
    class of which every component makes an instance, where there is one.
    What is in no config and changes no run, as metrics do not, is registered alike with `in_config=False`.
    """

    def __init__(
        self, path: str, what: str, *, default: str | Sequence[str], arity: Arity = "one", in_config: bool = True,
        base: type | None = None,
    ) -> None:  # fmt: skip
        self.path, self.what, self.default, self.arity, self.base = path, what, default, arity, base
        self.name, self.in_config = path.rpartition(".")[2], in_config
        self._components: dict[str, Component] = {}
        if self.name in SLOTS or self.name in BESIDE_CONFIG:
            raise ValueError(f"slot {self.name!r} is already defined")
        (SLOTS if in_config else BESIDE_CONFIG)[self.name] = self

    def register(
        self,
        name: str,
        *,
        source: str,
        can: Sequence[str] = (),
        needs: Mapping[str, str] | None = None,
        check: Check | None = None,
        examples: Sequence[Mapping[str, Any]] = (),
        tags: Sequence[str] = (),
    ) -> Callable[[F], F]:
        """Decorator that makes a function or class a component.

        source: where it was first described (arXiv number, paper, repository).
        can:    capability words that other components may ask for.
        needs:  slot -> capability word that every choice there must have.
        check:  (config section, options) -> sentences about arithmetic limits that these options would break.
        examples: sets of options worth showing; the contract tests run each of them beside the defaults.
        tags:   words for people. `bug` marks a mistake made on purpose: it is listed as one and reports say so.
        """
        if not source:
            raise ValueError(f"{self.name} {name!r} names no source")
        if name in self._components:
            raise ValueError(f"{self.name} {name!r} is registered already, by {self[name].factory.__module__}")

        def add(factory: F) -> F:
            if not inspect.getdoc(factory):
                raise ValueError(f"{self.name} {name!r} has no docstring: say what it does and which shapes it takes")
            component = Component(
                self.name, name, factory, source, frozenset(can), dict(needs or {}), check, tuple(examples),
                frozenset(tags),
            )  # fmt: skip
            for option, parameter in component.parameters.items():
                if option == "name":
                    raise ValueError(f"{self.name} {name!r}: an option cannot be called 'name'")
                if parameter.annotation is parameter.empty:
                    raise ValueError(f"{self.name} {name!r}: option {option!r} has no type (write {option}: int, say)")
            if inspect.isclass(factory) and self.base and not issubclass(factory, self.base):
                raise ValueError(f"{self.name} {name!r} does not derive from {self._base_name}")
            self._components[name] = component
            return factory

        return add

    @property
    def _base_name(self) -> str:
        return f"{self.base.__module__}.{self.base.__name__}".removeprefix("builtins.") if self.base else ""

    def names(self) -> list[str]:
        """Registered names, in the order they were registered."""
        return list(self._components)

    def __getitem__(self, name: str) -> Component:
        return self._components[name]

    def __contains__(self, name: object) -> bool:
        return name in self._components

    def __iter__(self) -> typing.Iterator[Component]:
        return iter(self._components.values())

    def read(self, raw: object) -> Choice:
        """A written choice (a name, or a mapping with `name` and options) as a Choice; raises Misfit."""
        if isinstance(raw, Choice):
            return raw
        if isinstance(raw, str):
            raw = {"name": raw}
        if not isinstance(raw, Mapping) or "name" not in raw:
            raise Misfit([("", f"write a {self.name} as its name, or as {{name: ..., option: ...}}")])
        if not isinstance(raw["name"], str):
            raise Misfit([("name", f"{raw['name']} does not fit: the name of a {self.name} is expected")])
        if raw["name"] not in self._components:
            raise Misfit([("", unknown(self.name, raw["name"], self._components) + "; a plug-in's: --plugin FILE")])
        component = self._components[raw["name"]]
        given = {key: value for key, value in raw.items() if key != "name"}
        return Choice(self.name, component.name, component.options_from(given))

    def read_all(self, raw: object) -> tuple[Choice, ...]:
        """A written choice or list of choices as a tuple; raises Misfit with every problem in the list."""
        items = list(raw) if isinstance(raw, (list, tuple)) else [raw]
        choices: list[Choice] = []
        problems: list[tuple[str, str]] = []
        for index, item in enumerate(items):
            try:
                choices.append(self.read(item))
            except Misfit as misfit:
                here = [str(index)] if len(items) > 1 else []
                problems += [(".".join(here + ([key] if key else [])), what) for key, what in misfit.problems]
        if problems:
            raise Misfit(problems)
        return tuple(choices)

    def json_schema(self) -> dict[str, Any]:
        """JSON Schema of what a config may have here: a component's name, or a mapping with its options, or a list."""
        bare = [c.name for c in self if c.parameters.keys() == c.defaults().keys()]
        mappings = [component.json_schema() for component in self]
        choice: dict[str, Any] = {"anyOf": [{"enum": bare}, *mappings]}
        if self.arity != "one":
            choice["anyOf"].append({"type": "array", "items": {"anyOf": [{"enum": bare}, *mappings]}})
        return {"description": self.what, "default": self.default, **choice}

    def build(self, choice: Choice, *args: Any) -> Any:
        """Call the chosen component with `args` and its options. Raises ConfigError if that makes no `base`."""
        made = self._components[choice.name].factory(*args, **choice.options)
        if self.base and not isinstance(made, self.base):
            what = f"{self.name} {choice.name} makes a {type(made).__name__}, which is no {self._base_name}"
            raise ConfigError(what, where=self.path, hint="docs/components.md, the contract")
        return made


SLOTS: dict[str, Slot] = {}
"""Those of a config, by name."""
BESIDE_CONFIG: dict[str, Slot] = {}
"""The others."""
PLUGINS: list[str] = []
"""Plug-in files loaded so far, for the processes that this one starts."""


def read_field(slot: str, raw: object) -> Choice | tuple[Choice, ...]:
    """For pydantic validators: a config field's written value as the slot's choice or choices."""
    field_slot = SLOTS.get(slot) or BESIDE_CONFIG[slot]
    try:
        return field_slot.read(raw) if field_slot.arity == "one" else field_slot.read_all(raw)
    except Misfit as misfit:
        raise PydanticCustomError("misfit", "{what}", {"what": str(misfit), "problems": misfit.problems}) from None


def mistakes(choices: Sequence[Choice]) -> list[Choice]:
    """Those of `choices` that are a mistake on purpose."""
    return [choice for choice in choices if BUG in SLOTS[choice.slot][choice.name].tags]


def unmet_needs(choices: Sequence[Choice]) -> list[tuple[str, str]]:
    """(slot path, sentence) for every capability that a choice needs and a chosen neighbour lacks."""
    problems = []
    for choice in choices:
        for slot, word in SLOTS[choice.slot][choice.name].needs.items():
            able = ", ".join(c.name for c in SLOTS[slot] if word in c.can) or "none"
            for other in sorted({c.name for c in choices if c.slot == slot}):
                if word not in SLOTS[slot][other].can:
                    lacks = f"{choice.name} needs '{word}' from the {slot}, which {other} does not offer"
                    problems.append((SLOTS[choice.slot].path, f"{lacks} (those that do: {able})"))
    return problems


def load_entry_points() -> None:
    """Import the components that installed packages offer under the entry-point group `gpt2lab.components`."""
    for point in entry_points(group=ENTRY_POINTS):
        try:
            point.load()
        except Exception as error:
            raise ConfigError(
                f"plug-in failed to load: {error!r}",
                where=f"entry point {point.name} ({point.value})",
                hint=f"pip show {point.dist.name if point.dist else point.value}",
            ) from error


def load_plugin(path: str | Path) -> list[Component]:
    """Run a Python file that registers components and return them; one that is loaded already, or an equal copy of it,
    is not run again."""
    file = Path(os.path.realpath(found(path)))  # resolve() raises RuntimeError for a loop of links
    if not file.is_file() or file.suffix != ".py":
        what = (
            "no such plug-in file" if not file.exists() else "a plug-in is a Python file, with a name that ends in .py"
        )
        raise ConfigError(what, where=str(path), hint="gpt2lab components")
    content = file.read_bytes()
    file = next((known for known in map(Path, PLUGINS) if known.is_file() and known.read_bytes() == content), file)
    name = f"gpt2lab_plugin_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    before = {(c.slot, c.name) for slot in SLOTS.values() for c in slot}
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException as error:
            del sys.modules[name]
            if isinstance(error, (KeyboardInterrupt, Stopped)):
                raise
            raise ConfigError([_fault(error, str(path), file)]) from error
        PLUGINS.append(str(file))
    return [
        c for slot in SLOTS.values() for c in slot if c.factory.__module__ == name or (c.slot, c.name) not in before
    ]


def _fault(error: BaseException, path: str, file: Path) -> Problem:
    """Why a plug-in failed to load, with the line of its file that did it."""
    line, what = line_in(error, str(file)), f"{type(error).__name__}: {error}"
    if isinstance(error, SyntaxError) and error.filename == str(file):
        line, what = error.lineno, str(error.msg)
    return Problem(f"{path}:{line}" if line else path, f"plug-in failed to load: {what}")


def line_in(error: BaseException, file: str) -> int | None:
    """The innermost line of `file` in the trace of an error; None if it was raised elsewhere."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return lines[-1] if lines else None
