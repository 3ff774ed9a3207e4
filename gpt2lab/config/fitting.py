"""Converts a tree of strings to typed settings, or collects every problem with its line."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import ValidationError

from gpt2lab.config.source import Key, Place, YamlSource, dotted
from gpt2lab.errors import ConfigError, Problem, edits, nearest, synonym, unknown
from gpt2lab.schema import Settings, reason, shown, type_name

S = TypeVar("S", bound=Settings)
MAX_PROBLEMS = 50


@dataclass(frozen=True)
class Complaint:
    """A problem, and the keys that are involved, the most specific one first."""

    what: str
    keys: tuple[Key, ...]


def check(
    settings: type[S], source: YamlSource, *, stand_ins: Mapping[str, Any] | None = None
) -> tuple[S | None, list[Complaint]]:
    """Settings and their problems.

    A wrong value is replaced by its default or stand-in, so that the rest can be checked in the same pass; None where
    there is neither.
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


def error_of(problems_at: Iterable[Located], *, more: Iterable[Problem] = (), hint: str | None = None) -> ConfigError:
    """One error in the order of layers and lines, then `more`; each problem once, at most MAX_PROBLEMS."""
    ordered = sorted(problems_at, key=lambda item: (item[0].layer, item[0].line))
    problems = list(dict.fromkeys([*(problem for _, problem in ordered), *more]))
    omitted = len(problems) - MAX_PROBLEMS
    if omitted > 0:
        problems = [*problems[:MAX_PROBLEMS], Problem("", f"and {omitted} more problems")]
    return ConfigError(problems, hint=hint)


def located(source: YamlSource, complaint: Complaint) -> Located:
    """The complaint at the place of its key that was written last, which the user changed most recently. One that
    begins with a value names the key that has it."""
    keys = complaint.keys or ((),)
    key = max(keys, key=lambda key: (source.place(key).layer, key in source.places))  # the first of equals
    place, about = source.place(key), keys[0]
    what = complaint.what
    if key != about and what[:1].isdigit():
        what = f"{dotted(about)}: {what}"
    return place, Problem((place.prefix + dotted(key)).rstrip(": "), what)


def _complaints(settings: type[Settings], source: YamlSource, error: ValidationError) -> Iterator[Complaint]:
    """pydantic's errors as complaints, one for each value."""
    errors = [(entry, *_walk(source.tree, entry["loc"])) for entry in error.errors(include_url=False)]
    holders = {key[:length] for _, key, _ in errors for length in range(len(key))}
    reported: set[Key] = set()
    for index, (entry, key, remainder) in enumerate(errors):
        if entry["type"] == "misfit":
            for option, what in entry["ctx"]["problems"]:
                yield Complaint(what, (_below(source.tree, key, option),))
        elif entry["type"] == "extra_forbidden":
            what = _unknown_key(settings, key) if index < MAX_PROBLEMS else "unknown key"  # suggestions are slow
            yield Complaint(what, (key,))
        elif entry["type"] == "missing" and _class_at(settings, key) is not None:
            yield Complaint("is missing, and has no default", ((*key, *remainder),))
        elif key not in reported and key not in holders:
            reported.add(key)  # a union reports one error per member; the first is kept
            yield Complaint(_sentence(settings, source, key, entry, bool(remainder)), (key,))


def _sentence(settings: type[Settings], source: YamlSource, key: Key, entry: Any, of_union: bool) -> str:
    """Why a value was refused."""
    value: Any = source.tree
    for step in key:
        value = value[step]
    written = "an empty value" if value == "" else shown(value)
    owner = _class_at(settings, key[:-1])
    own_message = entry["type"] == "value_error"  # our validators' messages say more than a list of types
    if of_union and not own_message and owner is not None and str(key[-1]) in owner.model_fields:
        return f"{written} does not fit: {_expected(owner.model_fields[str(key[-1])].annotation)} is expected"
    return f"{written} does not fit: {reason(entry)}"


WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}


def _expected(annotation: Any) -> str:
    """The types that a union admits, for users."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _expected(args[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_expected(member) for member in args)
    if origin in (list, tuple):
        return "a list"
    return "keys with values" if origin is dict else WORDS.get(annotation, type_name(annotation))


def _unknown_key(settings: type[Settings], key: Key) -> str:
    """The message for an unknown key, with a suggestion, also from other sections."""
    name, owner = str(key[-1]), _class_at(settings, key[:-1])
    siblings = list(owner.model_fields) if owner else []
    elsewhere = {field.rpartition(".")[2]: field for field in _fields(settings)}
    guess = nearest(name, siblings)
    if meant := synonym(name, elsewhere):
        return f"unknown key '{name}'; did you mean '{meant if meant in siblings else elsewhere[meant]}'?"
    other_section = name if name in elsewhere else nearest(name, elsewhere) if guess is None else None
    if other_section is None or (guess is not None and edits(name.casefold(), guess.casefold()) <= 1):
        return unknown("key", name, siblings)
    place = elsewhere[other_section]
    return f"unknown key '{name}'; did you mean '{place}'{'' if '.' in place else ', in no section'}?"


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
    return next((section for a in typing.get_args(annotation) if (section := _settings_class(a))), None)


def _class_at(settings: type[Settings], key: Key) -> type[Settings] | None:
    """The settings class of the section at `key`."""
    section: type[Settings] | None = settings
    for step in key:
        field = section.model_fields.get(str(step)) if section else None
        section = _settings_class(field.annotation) if field else None
    return section


def _field(settings: type[Settings], key: Key) -> Key:
    """`key` cut to the setting that contains it."""
    for length in range(1, len(key)):
        if _class_at(settings, key[:length]) is None:
            return key[:length]
    return key


def _walk(tree: Any, location: Sequence[str | int]) -> tuple[Key, Key]:
    """pydantic's location as the key in the tree, and the remainder (names of types, missing keys)."""
    key: list[str | int] = []
    for index, step in enumerate(location):
        if _has(tree, step):
            key.append(step)
            tree = tree[step]
        elif not any(_has(tree, following) for following in location[index + 1 : index + 2]):  # else the name of a type
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
