"""JSON schemas of our YAML files, by which editors complete and explain keys. They accept every short form that files
may use, and sometimes more: `gpt2lab check` is what finds mistakes."""

from __future__ import annotations

from typing import Any

from gpt2lab.registry import SLOTS
from gpt2lab.schema import Settings

BESIDE = {
    "extends": {"type": "string", "description": "The preset or file that this one changes."},
    "branch": {"type": "object", "description": "The checkpoint or weights to start from."},
}
"""Keys of a preset's file that are no settings of a config."""
LITERAL = ("default", "enum", "const", "title", "description", "required")
SHORT: dict[str, Any] = {"type": ["string", "number", "boolean", "array", "null"]}


def json_schema(settings: type[Settings], *, preset: bool = False) -> dict[str, Any]:
    """The JSON schema of a file with these settings; preset: of a config, which other configs may extend. All slots
    must be filled."""
    schema = settings.model_json_schema()
    definitions: dict[str, Any] = schema.get("$defs", {})
    for slot in SLOTS.values():
        section, _, name = slot.path.rpartition(".")
        owner = definitions.get(f"{section.capitalize()}Config", {}).get("properties", {})
        if name in owner:
            owner[name] = {"description": slot.what, "anyOf": [*slot.json_schema()["anyOf"], SHORT]}
    definitions["Choice"] = {"type": ["string", "object", "null"]}
    for definition in (schema, *definitions.values()):
        if definition is not schema or preset:  # a file changes some keys of what it extends
            definition.pop("required", None)
        properties = definition.get("properties", {})
        definition["properties"] = {key: _with_short_forms(value) for key, value in properties.items()}
    if preset:
        schema["properties"] |= BESIDE
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _with_short_forms(value: Any) -> Any:
    """The schema of a value, and the short forms: `flops` for `{axis: flops}`, a list for choices, `0.5x` or `6h` for
    numbers. Keys of objects stay what they are."""
    if isinstance(value, list):
        return [_with_short_forms(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "$ref" in value:
        rest = {key: item for key, item in value.items() if key != "$ref"}
        return {**rest, "anyOf": [{"$ref": value["$ref"]}, SHORT]}
    walked = {key: item if key in LITERAL else _with_short_forms(item) for key, item in value.items()}
    if walked.get("type") in ("number", "integer"):
        walked["type"] = [walked["type"], "string"]
    return walked
