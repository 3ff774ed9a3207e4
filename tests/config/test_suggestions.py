"""Typos at edit distance 1 of every key and component name: the suggestion is right for at least 95 %."""

from __future__ import annotations

import random
import string

from gpt2lab.config import Config, load_config, preset_names
from gpt2lab.errors import ConfigError, edits, nearest, unknown
from gpt2lab.planning.ablation import Ablation
from gpt2lab.registry import SLOTS
from gpt2lab.schema import Settings

LETTERS = string.ascii_lowercase + string.digits + "_"


def typos(name: str) -> set[str]:
    """Every string one edit away: a letter dropped, added, replaced, or two neighbours swapped."""
    cuts = [(name[:i], name[i:]) for i in range(len(name) + 1)]
    dropped = {a + b[1:] for a, b in cuts if b}
    swapped = {a + b[1] + b[0] + b[2:] for a, b in cuts if len(b) > 1}
    replaced = {a + c + b[1:] for a, b in cuts if b for c in LETTERS}
    added = {a + c + b for a, b in cuts for c in LETTERS}
    return (dropped | swapped | replaced | added) - {name, ""}


def groups() -> dict[str, list[str]]:
    """Names that can stand in one place, by that place."""
    found = {"": list(Config.model_fields), "ablation": list(Ablation.model_fields), "preset": preset_names()}
    for section, field in Config.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
            found[section] = list(field.annotation.model_fields)
    for slot in SLOTS.values():
        found[slot.path] = slot.names()
        for component in slot:
            found[f"{slot.path}={component.name}"] = list(component.parameters)
    return found


def test_the_nearest_name_is_right_for_95_percent_of_typos() -> None:
    right = tried = 0
    for names in groups().values():
        for name in names:
            options = sorted(typos(name) - set(names))
            for typo in random.Random(name).sample(options, min(40, len(options))):
                tried += 1
                right += nearest(typo, names) == name
    assert tried > 3_000
    assert right / tried >= 0.95, right / tried


def test_messages_about_typos_name_the_right_key_or_component() -> None:
    right = tried = 0
    for section, names in groups().items():
        if section not in Config.model_fields and section not in {slot.path for slot in SLOTS.values()}:
            continue
        for name in names:
            options = [typo for typo in sorted(typos(name) - set(names)) if typo[0].isalpha()]
            for typo in random.Random(name).sample(options, 4):
                override = f"{section}={typo}" if "." in section else f"{section}.{typo}=1"
                try:
                    load_config("nano", [override])
                except ConfigError as error:
                    tried += 1
                    right += f"did you mean '{name}'?" in str(error)
    assert tried > 300
    assert right / tried >= 0.95, right / tried


def test_edits_counts_swaps_once() -> None:
    pairs = [("", "abc"), ("rmsnrom", "rmsnorm"), ("kitten", "sitting"), ("ca", "abc")]
    assert [edits(a, b) for a, b in pairs] == [3, 1, 3, 3]


def test_what_is_far_from_everything_gets_no_suggestion() -> None:
    assert nearest("xyzzy", ["layernorm", "rmsnorm"]) is None
    assert nearest("x" * 100_000, ["x" * 99_999]) is None
    assert nearest("warmup", ["lr", "warmup_steps"]) == "warmup_steps"
    assert len(unknown("norm", "x" * 100_000, ["rmsnorm"])) < 200


def test_a_long_list_of_names_is_cut() -> None:
    said = unknown("run", "beef", (f"{number:016x}" for number in range(5000)))
    assert len(said) < 1200 and said.endswith(" and 4,940 more)")
