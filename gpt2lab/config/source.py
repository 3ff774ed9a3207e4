"""Parses YAML text into a tree of strings with the position of every key.

Strict on purpose: scalars stay text (`off`, `1e-6` and `12:00` are not converted), and tags, anchors, aliases, merge
keys, repeated keys and several documents are rejected. Only the parser's events are used, never a constructor, so that
no code in a file can run. `overlay` merges
one such tree over another.
"""

from __future__ import annotations

import copy
import os.path
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from yaml import events

from gpt2lab.errors import ConfigError, command, nearest
from gpt2lab.registry import SLOTS

Key = tuple[str | int, ...]
"""Path to a value: keys of mappings, positions in lists."""

MAX_BYTES = 256 * 1024
MAX_DEPTH = 32
MAX_VALUES = 2_000
ADVICE = {
    "scanning an alias": "a value that starts with * needs quotes",
    "scanning an anchor": "a value that starts with & needs quotes",
    "a tag": "a value that starts with ! needs quotes",
    "cannot start any token": "indent by spaces; a value that starts with a special character needs quotes",
    "mapping values are not allowed": "a value with a colon needs quotes",
}
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times faster where PyYAML was built with libyaml
_DOTTED = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+)*")


@dataclass(frozen=True)
class Place:
    """Where a value was written. `prefix`: of its dotted key in a message, such as `nano.yaml:7: ` or `--set `.

    `layer`: higher ones override lower ones. `line` orders within a layer.
    """

    prefix: str
    line: int = 0
    layer: int = 0


@dataclass(frozen=True)
class YamlSource:
    """A tree (or any part of one) with the place of every key. `file` is its name in messages."""

    tree: Any
    places: Mapping[Key, Place]
    file: str = ""

    def place(self, key: Key) -> Place:
        """The place of the key, else of the nearest key above it, else of the first below it."""
        for length in range(len(key), 0, -1):
            if key[:length] in self.places:
                return self.places[key[:length]]
        below = [place for key_below, place in self.places.items() if key_below[: len(key)] == key and key_below]
        return below[0] if key and below else self.places.get((), Place(f"{self.file}: " if self.file else ""))

    def part(self, key: Key) -> YamlSource:
        """The value at `key`, as a source."""
        tree = self.tree
        for step in key:
            tree = tree[step]
        inner = {
            key_of_place[len(key) :]: place
            for key_of_place, place in self.places.items()
            if key_of_place[: len(key)] == key
        }
        return YamlSource(tree, inner, self.file)

    def marked(self, prefix: str) -> YamlSource:
        """A copy with `prefix` appended to the prefix of every place."""
        return replace(self, places={k: replace(p, prefix=p.prefix + prefix) for k, p in self.places.items()})

    def without(self, keys: Iterable[Key]) -> YamlSource:
        """A copy without some keys."""
        tree = copy.deepcopy(self.tree)
        for key in keys:
            holder = tree
            for step in key[:-1]:
                holder = holder.get(step, {}) if isinstance(holder, dict) else {}
            if isinstance(holder, dict):
                holder.pop(key[-1], None)
        return replace(self, tree=tree)


def read_file(path: str | Path) -> YamlSource:
    """The mapping in a YAML file. Raises ConfigError for anything else."""
    file = str(path)
    try:
        if os.path.isdir(file):
            raise ConfigError("a folder, not a YAML file", where=shown_path(file), hint=command("ls", file))
        if os.path.exists(file) and not os.path.isfile(file):
            raise ConfigError("no regular file, which can be read more than once", where=shown_path(file))
        if not os.path.isfile(file):
            raise ConfigError("no such file" + _similar(Path(file)), where=shown_path(file))
        with open(file, "rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
        text = raw.decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError("not UTF-8 text", where=f"{shown_path(file)}:{line}") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"cannot be read: {reason}", where=shown_path(file)) from error
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"larger than {MAX_BYTES // 1024} KiB: is this a configuration?", where=shown_path(file))
    return read_mapping(text, file)


def read_mapping(text: str, file: str, *, max_values: int = MAX_VALUES) -> YamlSource:
    """The mapping in YAML text; `file` is its name in messages."""
    source = parse(text, file, max_values=max_values)
    if source.tree == "":
        raise ConfigError("empty: a mapping of keys to values is expected", where=shown_path(file))
    if not isinstance(source.tree, dict):
        kind = "a list" if isinstance(source.tree, list) else "plain text"
        raise ConfigError(f"{kind} at its root: a mapping of keys to values is expected", where=shown_path(file))
    return source


def read_override(written: str, index: int = 0) -> tuple[str, YamlSource]:
    """`key=value` as its dotted key and the value, which is read as YAML. Raises ConfigError.

    index: its position among several.
    """
    key, equals, text = written.partition("=")
    key = key.strip()
    if not equals or not _DOTTED.fullmatch(key):
        raise ConfigError("write key=value, such as model.n_layer=6", where=f"--set {shown_path(written)}")
    if len(text) > MAX_BYTES:
        raise ConfigError(f"longer than {MAX_BYTES // 1024} KiB", where=f"--set {key}")
    value = parse(text, f"--set {key}")
    return key, YamlSource(value.tree, dict.fromkeys([(), *value.places], Place("--set ", index)), "--set")


def parse(text: str, file: str, *, max_values: int = MAX_VALUES) -> YamlSource:
    """Any YAML text as a source; empty text is an empty string. Raises ConfigError with file and line."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError("not UTF-8 text", where=shown_path(file)) from error
    try:
        return _Reader(yaml.parse(text, Loader=_LOADER), file, max_values).document()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = " ".join(part for part in (error.context, error.problem) if part)
        advice = next((f" ({advice})" for sign, advice in ADVICE.items() if sign in what), "")
        raise ConfigError(f"not valid YAML: {what}{advice}", where=at(file, mark)) from error
    except yaml.YAMLError as error:  # characters that YAML does not allow
        raise ConfigError(f"not valid YAML: {' '.join(str(error).split())[:120]}", where=shown_path(file)) from error


def at(file: str, mark: Any) -> str:
    """`file:line`, or the file alone where there is no line."""
    return f"{shown_path(file)}:{mark.line + 1}" if mark is not None and not file.startswith("--") else shown_path(file)


@dataclass
class _Reader:
    """One pass over the parser's events; stops at the first one that is rejected, so that nested aliases never
    expand."""

    events: Iterator[Any]
    file: str
    max_values: int
    places: dict[Key, Place] = field(default_factory=dict)

    def document(self) -> YamlSource:
        """The only document."""
        tree: Any = ""
        documents = 0
        for event in self.events:
            if isinstance(event, events.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise self.refuse(event, "a second document begins here: one per file, please")
                tree = self.value(next(self.events), ())
        return YamlSource(tree, self.places, self.file)

    def value(self, event: Any, key: Key) -> Any:
        """The value that `event` opens."""
        self.accept(event, key)
        self.places.setdefault(key, self.place_of(event))
        if isinstance(event, events.MappingStartEvent):
            return self.mapping(key)
        if isinstance(event, events.SequenceStartEvent):
            items: list[Any] = []
            while not isinstance(event := next(self.events), events.SequenceEndEvent):
                items.append(self.value(event, (*key, len(items))))
            return items
        return event.value

    def mapping(self, key: Key) -> dict[str, Any]:
        """The rest of a mapping."""
        tree: dict[str, Any] = {}
        while not isinstance(event := next(self.events), events.MappingEndEvent):
            self.accept(event, key)
            if not isinstance(event, events.ScalarEvent):
                raise self.refuse(event, "a key must be plain text")
            name = event.value
            if name == "<<" and not event.style:
                raise self.refuse(event, "merge keys (<<) are not accepted: write the keys out")
            if name in tree:
                first = self.places[(*key, name)].line
                raise self.refuse(event, f"'{dotted((*key, name))}' is written twice, first in line {first}")
            self.places[(*key, name)] = self.place_of(event)
            tree[name] = self.value(next(self.events), (*key, name))
        return tree

    def accept(self, event: Any, key: Key) -> None:
        """Raise ConfigError for anything but a plain mapping, list or scalar, and beyond the limits."""
        is_alias, tag = isinstance(event, events.AliasEvent), getattr(event, "tag", None)
        if is_alias or event.anchor is not None or tag is not None:
            kind, sign = (
                ("aliases", "*") if is_alias else ("anchors", "&") if event.anchor is not None else ("tags", "!")
            )
            text = str(tag).replace("tag:yaml.org,2002:", "!!") if kind == "tags" else sign + event.anchor
            raise self.refuse(event, f"{kind} ({text}) are not accepted; a value that starts with {sign} needs quotes")
        if len(key) > MAX_DEPTH:
            raise self.refuse(event, f"nested more than {MAX_DEPTH} levels deep")
        if len(self.places) > self.max_values:
            raise self.refuse(event, f"more than {self.max_values} values: is this a configuration?")

    def place_of(self, event: Any) -> Place:
        line = event.start_mark.line + 1
        return Place(f"{at(self.file, event.start_mark)}: ", line)

    def refuse(self, event: Any, what: str) -> ConfigError:
        return ConfigError(what, where=at(self.file, event.start_mark))


def dotted(key: Key) -> str:
    """A key in dotted form."""
    return ".".join(map(str, key))


def shown_path(path: str) -> str:
    """A path or argument, cut to 200 characters."""
    text = path or "''"
    return text if len(text) <= 200 else "..." + text[-197:]


def _similar(path: Path) -> str:
    try:
        names = {file.stem: file.name for file in path.parent.iterdir() if file.suffix in (".yaml", ".yml")}
    except OSError:
        return ""
    guess = nearest(path.stem, names)
    return f"; did you mean '{path.with_name(names[guess])}'?" if guess and names[guess] != path.name else ""


# --- one tree over another: a preset, a file, `--set`, the changes of an arm ---


def overlay(base: YamlSource, changes: Iterable[tuple[str, YamlSource]]) -> YamlSource:
    """`base` with changes by dotted key, applied in order.

    A mapping for a section changes the keys that it holds. For a slot, `model.position` replaces the whole choice, and
    `optim.schedule.final_fraction` changes one of its options. Raises ConfigError for an option of a
    list of several choices that does not say which one (`model.mask.0.window` does).
    """
    tree, places = copy.deepcopy(base.tree), dict(base.places)
    layer = 1 + max((place.layer for place in base.places.values()), default=0)
    for key, value in changes:
        if isinstance(value.tree, dict):
            places.setdefault(tuple(key.split(".")), replace(value.place(()), layer=layer))
        for path, part in expand(key, value):
            _put(tree, places, path, part, layer)
    return YamlSource(tree, places, base.file)


def expand(key: str, value: YamlSource) -> Iterator[tuple[str, YamlSource]]:
    """A change of a section as changes of its keys; slots and their options are not split."""
    in_slot = any(key == slot.path or key.startswith(f"{slot.path}.") for slot in SLOTS.values())
    if in_slot or not isinstance(value.tree, dict) or not value.tree:
        yield key, value
        return
    for name in value.tree:
        yield from expand(f"{key}.{name}", value.part((name,)))


def _put(tree: dict[str, Any], places: dict[Key, Place], key: str, value: YamlSource, layer: int) -> None:
    """Write `value` at a dotted key, in place."""
    steps: list[str | int] = [*key.split(".")]
    written_at = replace(value.place(()), layer=layer)
    slot = next((slot for slot in SLOTS.values() if key.startswith(f"{slot.path}.")), None)
    option = key[len(slot.path) + 1 :] if slot else ""
    if slot and option == "name":  # another component: drop the options of the old one
        steps, value = [*slot.path.split(".")], YamlSource({"name": value.tree}, {(): written_at})
    if slot and option != "name":
        *sections, name = slot.path.split(".")
        holder = _section(tree, places, sections, written_at)
        holder[name], inside = _as_mapping(holder.get(name, slot.default), option, written_at.prefix + key)
        holder, steps = holder[name], [*sections, name, *inside]
        for step in inside[:-1]:
            holder = holder[step]
    else:
        holder = _section(tree, places, steps[:-1], written_at)
        if value.tree == {} and isinstance(holder.get(steps[-1]), dict):
            return
    holder[steps[-1]] = copy.deepcopy(value.tree)
    for old in [old for old in places if old[: len(steps)] == tuple(steps)]:
        del places[old]
    for inner, place in value.places.items():
        places[(*steps, *inner)] = replace(place, layer=layer)


def _section(tree: Any, places: dict[Key, Place], steps: Sequence[str | int], place: Place) -> Any:
    """The mapping at `steps`; any other value there is replaced by an empty one, written at `place`."""
    for length, step in enumerate(steps, 1):
        if not isinstance(tree.get(step), dict):
            if step in tree:
                places[tuple(steps[:length])] = place
            tree[step] = {}
        tree = tree[step]
    return tree


def _as_mapping(written: Any, option: str, where: str) -> tuple[Any, list[str | int]]:
    """A written choice as a mapping (or list of them) that can hold options, and the path to `option` from the slot."""
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
        written[index], option_key = _as_mapping(written[index], option, where)
        return written, [index, *option_key]
    return (dict(written) if isinstance(written, dict) else {"name": written}), [option]
