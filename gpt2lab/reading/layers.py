"""Trees laid over one another: a preset, what a file says on top of it, `--set`, and the changes of an arm."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from gpt2lab.errors import ConfigError
from gpt2lab.reading.source import Key, Place, Source
from gpt2lab.registry import SLOTS


def lay(base: Source, changes: Iterable[tuple[str, Source]]) -> Source:
    """`base` with changes by dotted key, each over what was there before.

    A mapping for a section changes the keys that it holds. For a slot, `model.position` replaces the whole choice, and
    `optim.schedule.final_fraction` changes one option of it and keeps the rest. Raises ConfigError for an option of a
    list of several choices that does not say which one (`model.mask.0.window` does).
    """
    tree, places = copy.deepcopy(base.tree), dict(base.places)
    layer = 1 + max((place.layer for place in base.places.values()), default=0)
    for key, value in changes:
        if isinstance(value.tree, dict):
            places.setdefault(tuple(key.split(".")), replace(value.place(()), layer=layer))
        for path, part in expand(key, value):
            _put(tree, places, path, part, layer)
    return Source(tree, places, base.file)


def merge(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`lay` for plain trees: changes by dotted key."""
    laid: dict[str, Any] = lay(
        Source(dict(tree), {}), [(k, Source(v, {(): Place("")})) for k, v in changes.items()]
    ).tree
    return laid


def expand(key: str, value: Source) -> Iterator[tuple[str, Source]]:
    """A change of a whole section as changes of its keys; slots and their options stay whole."""
    in_slot = any(key == slot.path or key.startswith(f"{slot.path}.") for slot in SLOTS.values())
    if in_slot or not isinstance(value.tree, dict) or not value.tree:
        yield key, value
        return
    for name in value.tree:
        yield from expand(f"{key}.{name}", value.part((name,)))


def _put(tree: dict[str, Any], places: dict[Key, Place], key: str, value: Source, layer: int) -> None:
    """Write `value` at a dotted key of a tree of our own."""
    steps: list[str | int] = [*key.split(".")]
    here = replace(value.place(()), layer=layer)
    slot = next((slot for slot in SLOTS.values() if key.startswith(f"{slot.path}.")), None)
    option = key[len(slot.path) + 1 :] if slot else ""
    if slot and option == "name":  # another component: the options of the old one go
        steps, value = [*slot.path.split(".")], Source({"name": value.tree}, {(): here})
    if slot and option != "name":
        *sections, name = slot.path.split(".")
        holder = _section(tree, places, sections, here)
        holder[name], inside = _opened(holder.get(name, slot.default), option, here.prefix + key)
        holder, steps = holder[name], [*sections, name, *inside]
        for step in inside[:-1]:
            holder = holder[step]
    else:
        holder = _section(tree, places, steps[:-1], here)
        if value.tree == {} and isinstance(holder.get(steps[-1]), dict):
            return
    holder[steps[-1]] = copy.deepcopy(value.tree)
    for old in [old for old in places if old[: len(steps)] == tuple(steps)]:
        del places[old]
    for inner, place in value.places.items():
        places[(*steps, *inner)] = replace(place, layer=layer)


def _section(tree: Any, places: dict[Key, Place], steps: Sequence[str | int], here: Place) -> Any:
    """The mapping at `steps`; what is none makes room for one, which was written `here`."""
    for length, step in enumerate(steps, 1):
        if not isinstance(tree.get(step), dict):
            if step in tree:
                places[tuple(steps[:length])] = here
            tree[step] = {}
        tree = tree[step]
    return tree


def _opened(written: Any, option: str, where: str) -> tuple[Any, list[str | int]]:
    """A written choice in a form that takes one more option, and the way to that option from the slot."""
    written = list(written) if isinstance(written, (list, tuple)) else written
    if isinstance(written, list):
        first, _, rest = option.partition(".")
        if first.isdecimal() and int(first) < len(written) and rest:
            index, option = int(first), rest
        elif len(written) == 1:
            index = 0
        else:
            raise ConfigError(
                f"{len(written)} choices are there: say which one, as in ...0.{option}, or write them all", where=where
            )
        written[index], inside = _opened(written[index], option, where)
        return written, [index, *inside]
    return (dict(written) if isinstance(written, dict) else {"name": written}), [option]
