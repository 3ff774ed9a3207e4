"""Nested state of any optimizer, in two files that hold no code: plain JSON, and tensors by name.

A tensor's place in the JSON says `{"tensor": its name}`; `tuple` and `items` keep what JSON has no form for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gpt2lab.errors import ConfigError

MARKS = ("tensor", "tuple", "items")


def split(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """What JSON can hold of `tree`, exactly, and its tensors by dotted name; a tensor in two places is there once.

    Raises ConfigError for anything that is neither a tensor nor a number, text, list, tuple or mapping of such.
    """
    tensors: dict[str, Tensor] = {}
    names: dict[int, str] = {}

    def plain(value: Any, name: str) -> Any:
        inside = f"{name}." if name else ""
        if isinstance(value, Tensor):
            known = names.setdefault(id(value), name)
            tensors.setdefault(known, value.detach().contiguous())
            return {"tensor": known}
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, list):
            return [plain(v, f"{inside}{i}") for i, v in enumerate(value)]
        if isinstance(value, tuple):
            return {"tuple": [plain(v, f"{inside}{i}") for i, v in enumerate(value)]}
        if isinstance(value, Mapping):
            if all(isinstance(key, str) for key in value) and not set(MARKS) & set(value):
                return {key: plain(v, inside + key) for key, v in value.items()}
            return {"items": [[plain(key, name), plain(v, f"{inside}{key}")] for key, v in value.items()]}
        raise ConfigError(
            f"a checkpoint cannot hold {name}, a {type(value).__name__}, without code that runs when it is read",
            where="optim.optimizer",
            hint="keep tensors, numbers, text, lists and mappings in the optimizer's state",
        )

    return plain(tree, ""), tensors


def join(plain: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The tree that `split` took apart. Raises KeyError or TypeError for what `split` did not write."""
    if isinstance(plain, list):
        return [join(value, tensors) for value in plain]
    if not isinstance(plain, dict):
        return plain
    if "tensor" in plain:
        return tensors[plain["tensor"]]
    if "tuple" in plain:
        return tuple(join(value, tensors) for value in plain["tuple"])
    if "items" in plain:
        return {join(key, tensors): join(value, tensors) for key, value in plain["items"]}
    return {key: join(value, tensors) for key, value in plain.items()}
