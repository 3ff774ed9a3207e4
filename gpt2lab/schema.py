"""Typed, frozen settings: converts text from YAML to numbers, booleans and names.

YAML scalars are the strings that the user wrote; they are converted by the declared type only. So `1e-6` is a float
where a float is declared, and `off` is a valid arm name where a string is.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Mapping
from decimal import Decimal
from functools import lru_cache
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, field_validator
from pydantic_core import PydanticCustomError

ABSENT = ("null", "~", "")
MOST_DIGITS = 18  # more exceed 63 bits
TOO_LARGE = 10**MOST_DIGITS
EXPONENT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")


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
    """`value` prepared for conversion to `annotation`: written nulls become None, and whole numbers such as 1e3 digits;
    for numbers, booleans and too many digits are rejected."""
    allowed = _members(annotation)
    if type(None) in allowed and (value is None or (isinstance(value, str) and value in ABSENT)):
        return None
    if isinstance(value, bool) and bool not in allowed and allowed & {int, float}:
        raise PydanticCustomError("bool_for_number", "a number is expected, not a boolean")
    if int in allowed and not allowed & {str, float, typing.Literal}:
        if isinstance(value, str) and EXPONENT.fullmatch(value):
            number = Decimal(value)
            if number.adjusted() <= MOST_DIGITS and number == number.to_integral_value():
                value = int(number)
        if len(value) > MOST_DIGITS if isinstance(value, str) else isinstance(value, int) and abs(value) >= TOO_LARGE:
            raise PydanticCustomError("int_parsing_size", "it has too many digits")
    return value


def convert(value: object, annotation: Any) -> Any:
    """`value` as `annotation`; raises ValueError with a message that shows the value as written."""
    try:
        return _adapter(annotation).validate_python(plain(value, annotation))
    except (ValidationError, PydanticCustomError) as error:
        why = reason(error.errors()[0]) if isinstance(error, ValidationError) else lowered(error.message())
        raise ValueError(f"{shown(value)} does not fit: {why}") from None


def schema_of(annotation: Any) -> dict[str, Any]:
    """JSON Schema of what `convert` takes for `annotation`, as a YAML reader sees it."""
    return _adapter(annotation).json_schema()


def _adapter(annotation: Any) -> TypeAdapter[Any]:
    try:
        return _kept_adapter(annotation)
    except TypeError:  # an annotation that cannot be hashed
        return _kept_adapter.__wrapped__(annotation)


@lru_cache(maxsize=256)
def _kept_adapter(annotation: Any) -> TypeAdapter[Any]:
    """Cached, since building one takes a hundred times as long as using it."""
    return TypeAdapter(annotation, config=ConfigDict(allow_inf_nan=False))


def shown(value: object) -> str:
    """A value as written, cut to 80 characters."""
    text = f"'{value}'" if isinstance(value, str) else str(value)
    return text if len(text) <= 80 else text[:77] + "..."


REASONS = {
    "int": "a whole number is expected",
    "int_parsing_size": "it has too many digits",
    "float": "a number is expected",
    "finite": "a finite number is expected",
    "bool": "true or false is expected",
    "bool_for_number": "a number is expected, not a boolean",
    "string": "text is expected",
    "list": "a list is expected, such as [a, b]",
    "tuple": "a list is expected, such as [a, b]",
    "dict": "keys with values are expected, such as {{key: value}}",
    "model": "keys with values are expected, such as {{key: value}}",
    "greater_than": "it must be greater than {gt:g}",
    "greater_than_equal": "it must be at least {ge:g}",
    "less_than": "it must be less than {lt:g}",
    "less_than_equal": "it must be at most {le:g}",
    "literal": "{expected} is expected",
    "value": "{error}",
    "missing": "a value is missing",
    "too_long": "at most {max_length} values are expected",
    "too_short": "at least {min_length} values are expected",
}
"""Kind of pydantic's errors -> message. The longest prefix of an error's type is used."""


def reason(error: Any) -> str:
    """Why pydantic refused a value (one item of `ValidationError.errors()`), for users."""
    kinds = [kind for kind in REASONS if error["type"] == kind or error["type"].startswith(f"{kind}_")]
    if not kinds:
        return lowered(error["msg"])
    return REASONS[max(kinds, key=len)].format(**error.get("ctx", {}))


def lowered(sentence: str) -> str:
    """pydantic's sentence as the continuation of ours."""
    return sentence[:1].lower() + sentence[1:]


def type_name(annotation: Any) -> str:
    """An annotation for users: `float`, `int or null`, `'full' or 'half'`."""
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
    """The plain types that an annotation admits at its top level; Literal for given words, of which null is none."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _members(args[0])
    if origin in (typing.Union, types.UnionType):
        return set().union(*(_members(a) for a in args))
    if origin is typing.Literal:
        return {typing.Literal if isinstance(a, str) else type(a) for a in args}
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
