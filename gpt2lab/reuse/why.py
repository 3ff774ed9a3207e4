"""Why are two runs not the same run? Their identities part by part, down to the definitions whose code differs.

An identity holds hashes of code. What they stand for is kept in the store, each version once, in `runs/code/`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gpt2lab.errors import ConfigError
from gpt2lab.identity import PART_NAMES, sources
from gpt2lab.store import RunFolder, Store, read_json, write_json

if TYPE_CHECKING:
    from gpt2lab.config import Config

CODE = ("core", "components")
"""Parts of an identity that are hashes of code."""


@dataclass(frozen=True)
class RunDifference:
    """One thing in which two runs differ: `a` and `b` as they stand in each, or a definition's code line by line."""

    what: str
    a: str
    b: str
    code: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.what if not self.a and not self.b else f"{self.what}: {self.a} -> {self.b}"


def keep_sources(configs: Iterable[Config], store: Store) -> None:
    """Keep in the store what the code hashes of these configs' identities stand for."""
    for config in configs:
        for code, parts in sources(config).items():
            path = store.folder("code") / f"{code[:32]}.json"
            if not path.exists():
                write_json(path, parts)


def why(a: RunFolder, b: RunFolder, store: Store) -> list[RunDifference]:
    """Everything in which the identities of two runs differ; empty when they are the same. Raises ConfigError for a run
    without an identity."""
    first, second = _identity(a), _identity(b)
    differences = [
        RunDifference(key, x, y)
        for key, x, y in _different(_flat(first.get("settings", {})), _flat(second.get("settings", {})))
    ]
    for part, name in PART_NAMES.items():
        x, y = first.get(part), second.get(part)
        if x != y:
            differences.append(RunDifference(name, _short(x), _short(y)))
    if first.get("core") != second.get("core"):
        differences += _code("core code", first.get("core"), second.get("core"), store)
    components, others = first.get("components", {}), second.get("components", {})
    for name in sorted(components.keys() & others.keys()):
        if components[name] != others[name]:
            differences += _code(f"code of {name}", components[name], others[name], store)
    return differences


def without_code(identity: Mapping[str, Any]) -> dict[str, Any]:
    """An identity with the names of its components in the place of their code."""
    return {k: v for k, v in identity.items() if k not in CODE} | {"components": sorted(identity.get("components", {}))}


def _identity(run: RunFolder) -> dict[str, Any]:
    record = run.identity()
    if record is None or "identity" not in record:
        raise ConfigError("no identity is kept of this run: it never began", where=run.id, hint="gpt2lab runs")
    identity: dict[str, Any] = record["identity"]
    return identity


def _code(what: str, a: str | None, b: str | None, store: Store) -> Iterator[RunDifference]:
    """Each definition that differs; one sentence where the store does not know what a hash stands for."""
    first, second = (read_json(store.root / "code" / f"{str(code)[:32]}.json") for code in (a, b))
    if first is None or second is None:
        yield RunDifference(f"{what}; in what, the store does not know", _short(a), _short(b))
        return
    for name in sorted(first.keys() | second.keys()):
        x, y = first.get(name), second.get(name)
        if x == y:
            continue
        how = "added" if x is None else "gone" if y is None else "changed"
        lines = difflib.unified_diff(str(x or "").splitlines(), str(y or "").splitlines(), lineterm="", n=2)
        yield RunDifference(f"{what}: {name.replace(':', '.')} {how}", "", "", tuple(lines)[2:])


def _flat(tree: Any, prefix: str = "") -> dict[str, str]:
    """Settings by dotted key."""
    if isinstance(tree, Mapping):
        return {k: v for name, inner in tree.items() for k, v in _flat(inner, f"{prefix}{name}.").items()}
    if isinstance(tree, list) and len(tree) == 1:  # one component for all layers
        return _flat(tree[0], prefix)
    if isinstance(tree, list):
        return {k: v for index, inner in enumerate(tree) for k, v in _flat(inner, f"{prefix}{index}.").items()}
    return {prefix.removesuffix("."): str(tree)}


def _different(a: Mapping[str, str], b: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    for key in dict.fromkeys([*a, *b]):
        if a.get(key) != b.get(key):
            yield key, a.get(key, "(not there)"), b.get(key, "(not there)")


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text
