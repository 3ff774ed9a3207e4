"""A tree of strings becomes typed settings, or one error with everything that does not fit, each at its line."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import ValidationError

from gpt2lab.config.source import Key, Place, YamlSource, dotted
from gpt2lab.errors import ConfigError, Problem, nearest, unknown
from gpt2lab.schema import Settings, reason, shown, type_name

S = TypeVar("S", bound=Settings)
MAX_PROBLEMS = 50


@dataclass(frozen=True)
class Complaint:
    """What is wrong, and the keys that are involved, the most telling one first."""

    what: str
    keys: tuple[Key, ...]


def check(
    settings: type[S], source: YamlSource, *, stand_ins: Mapping[str, Any] | None = None
) -> tuple[S | None, list[Complaint]]:
    """Settings and what is wrong with them.

    Where something is wrong, the settings have its default or stand-in (and are None, if there is neither), so that the
    rest can be checked further in the same pass.
    """
    try:
        return settings.model_validate(source.tree), []
    except ValidationError as error:
        complaints = list(_complaints(settings, source, error))
    try:
        rest = source.without({_field(settings, c.keys[0]) for c in complaints})
        return settings.model_validate({**(stand_ins or {}), **rest.tree}), complaints
    except ValidationError:
        return None, complaints


Located = tuple[Place, Problem]


def error_of(found: Iterable[Located], *, more: Iterable[Problem] = (), hint: str | None = None) -> ConfigError:
    """One error in the order of layers and lines, then `more`; each problem once, cut where nobody would read on."""
    ordered = sorted(found, key=lambda item: (item[0].layer, item[0].line))
    problems = list(dict.fromkeys([*(problem for _, problem in ordered), *more]))
    left = len(problems) - MAX_PROBLEMS
    if left > 0:
        problems = [*problems[:MAX_PROBLEMS], Problem("", f"and {left} more problems")]
    return ConfigError(problems, hint=hint)


def located(source: YamlSource, complaint: Complaint) -> Located:
    """The complaint at whichever of its keys was written last: that is the one which a user has just changed."""
    keys = complaint.keys or ((),)
    key = max(keys, key=lambda key: (source.place(key).layer, key in source.places))  # the first of equals
    place = source.place(key)
    return place, Problem((place.prefix + dotted(key)).rstrip(": "), complaint.what)


def _complaints(settings: type[Settings], source: YamlSource, error: ValidationError) -> Iterator[Complaint]:
    """pydantic's errors in our words, one for each value."""
    errors = [(found, *_walk(source.tree, found["loc"])) for found in error.errors(include_url=False)]
    holders = {key[:length] for _, key, _ in errors for length in range(len(key))}
    told: set[Key] = set()
    for index, (found, key, left) in enumerate(errors):
        if found["type"] == "misfit":
            for below, what in found["ctx"]["problems"]:
                yield Complaint(what, (_below(source.tree, key, below),))
        elif found["type"] == "extra_forbidden":
            what = _unknown_key(settings, key) if index < MAX_PROBLEMS else "unknown key"  # guessing takes a while
            yield Complaint(what, (key,))
        elif found["type"] == "missing" and _class_at(settings, key) is not None:
            yield Complaint("is missing, and has no default", ((*key, *left),))
        elif key not in told and key not in holders:
            told.add(key)  # a union complains once for each of its members; the one that fits deepest is meant
            yield Complaint(_sentence(settings, source, key, found, bool(left)), (key,))


def _sentence(settings: type[Settings], source: YamlSource, key: Key, found: Any, of_union: bool) -> str:
    """Why a value was refused."""
    value: Any = source.tree
    for step in key:
        value = value[step]
    written = "an empty value" if value == "" else shown(value)
    owner = _class_at(settings, key[:-1])
    ours = found["type"] == "value_error"  # a sentence of our own says more than a list of types
    if of_union and not ours and owner is not None and str(key[-1]) in owner.model_fields:
        return f"{written} does not fit: {_expected(owner.model_fields[str(key[-1])].annotation)} is expected"
    return f"{written} does not fit: {reason(found)}"


WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}


def _expected(annotation: Any) -> str:
    """What a union admits, in words that need no Python."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _expected(args[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_expected(member) for member in args)
    if origin in (list, tuple):
        return "a list"
    return "keys with values" if origin is dict else WORDS.get(annotation, type_name(annotation))


def _unknown_key(settings: type[Settings], key: Key) -> str:
    """The sentence for a key that no field has; a key that is at home in another section is recognised."""
    name, owner = str(key[-1]), _class_at(settings, key[:-1])
    beside = list(owner.model_fields) if owner else []
    elsewhere = {field.rpartition(".")[2]: field for field in _fields(settings)}
    guess = nearest(name, beside)
    other = name if name in elsewhere else nearest(name, elsewhere) if guess is None else None
    if other is None or name.casefold() == str(guess).casefold():
        return unknown("key", name, beside)
    return f"unknown key '{name}'; did you mean '{elsewhere[other]}'?"


def _fields(settings: type[Settings], prefix: str = "") -> Iterator[str]:
    """Dotted names of all fields of sections."""
    for name, field in settings.model_fields.items():
        inner = _settings_class(field.annotation)
        if inner:
            yield from _fields(inner, f"{prefix}{name}.")
        else:
            yield prefix + name


def _settings_class(annotation: Any) -> type[Settings] | None:
    """The settings class among an annotation's members."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return annotation
    return next((found for a in typing.get_args(annotation) if (found := _settings_class(a))), None)


def _class_at(settings: type[Settings], key: Key) -> type[Settings] | None:
    """The settings class of the section at `key`."""
    found: type[Settings] | None = settings
    for step in key:
        field = found.model_fields.get(str(step)) if found else None
        found = _settings_class(field.annotation) if field else None
    return found


def _field(settings: type[Settings], key: Key) -> Key:
    """`key` cut to the setting that it lies in: what can be left out as a whole."""
    for length in range(1, len(key)):
        if _class_at(settings, key[:length]) is None:
            return key[:length]
    return key


def _walk(tree: Any, location: Sequence[str | int]) -> tuple[Key, Key]:
    """pydantic's location as the key that was written, and what is left of it (names of types, missing keys)."""
    key: list[str | int] = []
    for index, step in enumerate(location):
        if _has(tree, step):
            key.append(step)
            tree = tree[step]
        elif not any(_has(tree, later) for later in location[index + 1 : index + 2]):  # else the name of a type
            return tuple(key), tuple(location[index:])
    return tuple(key), ()


def _below(tree: Any, key: Key, below: str) -> Key:
    """The key of a slot's choice or option: `below` is dotted, with positions as digits."""
    for step in key:
        tree = tree[step]
    for name in below.split(".") if below else []:
        if isinstance(tree, list) and not name.isdecimal() and len(tree) == 1:
            key, tree = (*key, 0), tree[0]
        step = int(name) if isinstance(tree, list) and name.isdecimal() else name
        key = (*key, step)
        tree = tree[step] if _has(tree, step) else None
    return key


def _has(tree: Any, step: str | int) -> bool:
    if isinstance(tree, (list, tuple)):
        return isinstance(step, int) and step < len(tree)
    return isinstance(tree, dict) and step in tree
