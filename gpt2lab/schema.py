"""Typed, frozen settings: the one place where text from YAML becomes numbers, booleans and names.

YAML scalars arrive here as the strings that the user wrote; only the declared type converts them. So `1e-6` is a float
where a float is declared, and `off` is a perfectly good arm name where a string is.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, field_validator
from pydantic_core import PydanticCustomError

ABSENT = ("null", "~", "")


class Settings(BaseModel):
    """Base of every configuration class: immutable, unknown keys refused, no NaN and no infinity."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True, use_attribute_docstrings=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _as_written(cls, value: object, info: Any) -> object:
        return plain(value, cls.model_fields[info.field_name].annotation)


def plain(value: object, annotation: Any) -> object:
    """`value` ready for conversion to `annotation`: written-out nulls become None, booleans are refused for numbers."""
    allowed = _members(annotation)
    if value is None or (isinstance(value, str) and value in ABSENT and str not in allowed):
        if type(None) in allowed:
            return None
    if isinstance(value, bool) and bool not in allowed and allowed & {int, float}:
        raise PydanticCustomError("bool_for_number", "a number is expected, not a boolean")
    return value


def convert(value: object, annotation: Any) -> Any:
    """`value` as `annotation`; raises ValueError with a sentence that shows the value as written."""
    try:
        return TypeAdapter(annotation, config=ConfigDict(allow_inf_nan=False)).validate_python(plain(value, annotation))
    except (ValidationError, PydanticCustomError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error.message()
        raise ValueError(f"{shown(value)} does not fit: {lowered(reason)}") from None


def shown(value: object) -> str:
    """A value as a user would recognise it, cut to one readable line."""
    text = f"'{value}'" if isinstance(value, str) else str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def lowered(sentence: str) -> str:
    """pydantic's sentence as the continuation of ours."""
    return sentence[:1].lower() + sentence[1:]


def type_name(annotation: Any) -> str:
    """An annotation as people write it: `float`, `int or null`, `'full' or 'half'`."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return type_name(args[0])
    if origin is typing.Literal:
        return " or ".join(repr(a) for a in args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_name(a) for a in args)
    if origin is not None:
        return f"{getattr(origin, '__name__', origin)} of {', '.join(type_name(a) for a in args if a is not ...)}"
    return "null" if annotation is type(None) else getattr(annotation, "__name__", str(annotation))


def _members(annotation: Any) -> set[Any]:
    """The plain types that an annotation admits at its top level."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _members(args[0])
    if origin in (typing.Union, types.UnionType):
        return set().union(*(_members(a) for a in args))
    if origin is typing.Literal:
        return {type(a) for a in args}
    return {origin or annotation}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys: {'a': {'b': 1}} -> {'a.b': 1}. An empty mapping stays a value."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = value
    return flat
