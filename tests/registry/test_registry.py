"""Slots: what may be registered, how written choices are read, and what is said when they do not fit."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gpt2lab import registry
from gpt2lab.errors import ConfigError
from gpt2lab.registry import Choice, Misfit, Slot, unmet_needs


@pytest.fixture
def slot() -> Iterator[Slot]:
    made = Slot("model.toy", "a slot for tests", default="round")

    @made.register("round", source="here", can=("roll",))
    def round_toy(site: Any, *, size: int = 3, weight: float | None = None, loud: bool = False) -> tuple[Any, ...]:
        """A toy that rolls."""
        return site, size, weight, loud

    @made.register("square", source="here")
    def square_toy(site: Any, *, side: float) -> tuple[Any, ...]:
        """A toy that does not roll."""
        return site, side

    yield made
    del registry.SLOTS["toy"]


def test_options_come_from_the_signature_and_convert_written_text(slot: Slot) -> None:
    choice = slot.read({"name": "round", "size": "5", "weight": "1e-6", "loud": "true"})
    assert choice.options == {"size": 5, "weight": 1e-6, "loud": True}
    assert slot.build(choice, "here") == ("here", 5, 1e-6, True)
    assert slot.read("round").options == {"size": 3, "weight": None, "loud": False}
    assert slot.read({"name": "round", "weight": "null"}).options["weight"] is None


def test_a_choice_is_written_in_its_shortest_form(slot: Slot) -> None:
    assert slot.read({"name": "round", "size": "3"}).written() == "round"
    assert slot.read({"name": "round", "size": "4"}).written() == {"name": "round", "size": 4}
    assert str(slot.read({"name": "round", "size": "4"})) == "round(size=4)"


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        ("ruond", "unknown toy 'ruond'; did you mean 'round'? (known: round, square); a plug-in's: --plugin FILE"),
        ({"name": "round", "sise": "5"}, "unknown option of toy round 'sise'; did you mean 'size'?"),
        ({"name": "round", "size": "big"}, "'big' does not fit"),
        ({"name": "round", "size": True}, "a number is expected, not a boolean"),
        ({"name": "round", "weight": "nan"}, "'nan' does not fit"),
        ("square", "toy square needs the option 'side' (float)"),
        ({"size": "5"}, "write a toy as its name"),
        (None, "write a toy as its name"),
    ],
)
def test_what_does_not_fit_is_explained(slot: Slot, raw: object, sentence: str) -> None:
    with pytest.raises(Misfit) as caught:
        slot.read(raw)
    assert sentence in str(caught.value)


def test_every_problem_of_a_list_is_reported_with_its_place(slot: Slot) -> None:
    with pytest.raises(Misfit) as caught:
        slot.read_all(["round", "oval", {"name": "round", "size": "x"}])
    assert [key for key, _ in caught.value.problems] == ["1", "2.size"]


def test_registering_refuses_what_would_be_unusable(slot: Slot) -> None:
    def fine(site: Any) -> None:
        """Documented."""

    def bare(site: Any) -> None: ...

    def untyped(site: Any, *, size=3) -> None:  # type: ignore[no-untyped-def]
        """Documented."""

    def named(site: Any, *, name: str = "x") -> None:
        """Documented."""

    with pytest.raises(ValueError, match="registered already"):
        slot.register("round", source="elsewhere")(fine)
    with pytest.raises(ValueError, match="names no source"):
        slot.register("fine", source="")(fine)
    with pytest.raises(ValueError, match="no docstring"):
        slot.register("bare", source="here")(bare)
    with pytest.raises(ValueError, match=r"toy 'untyped': option 'size' has no type \(write size: int, say\)"):
        slot.register("untyped", source="here")(untyped)
    with pytest.raises(ValueError, match="cannot be called 'name'"):
        slot.register("named", source="here")(named)
    with pytest.raises(ValueError, match="already defined"):
        Slot("other.toy", "again", default="round")
    assert slot.names() == ["round", "square"]


def test_what_is_made_has_the_class_of_its_slot(slot: Slot) -> None:
    slot.base = dict

    def lists(site: Any) -> list[Any]:
        """Makes something else."""
        return []

    class Listed(list[Any]):
        """Is something else."""

    slot.register("lists", source="here")(lists)
    with pytest.raises(ConfigError, match="toy lists makes a list, which is no dict"):
        slot.build(slot.read("lists"), "here")
    with pytest.raises(ValueError, match="toy 'listed' does not derive from dict"):
        slot.register("listed", source="here")(Listed)


def test_needs_name_who_could_meet_them(slot: Slot) -> None:
    @slot.register("slope", source="here", needs={"toy": "roll"})
    def slope(site: Any) -> None:
        """Something to roll down."""

    assert unmet_needs([Choice("toy", "round"), Choice("toy", "slope")])  # slope itself does not roll
    slot["slope"].needs["toy"] = "slide"  # type: ignore[index]
    [(path, sentence)] = unmet_needs([Choice("toy", "slope"), Choice("toy", "round")])[:1]
    assert path == "model.toy"
    assert sentence == "slope needs 'slide' from the toy, which round does not offer (those that do: none)"


PLUGIN = '''
from gpt2lab.components.norm import norm

@norm.register("{name}", source="a test")
def part(site):
    """Leave everything as it is, for a test of plug-ins."""
    import torch
    return torch.nn.Identity()
'''


@pytest.mark.usefixtures("no_plugins_after")
def test_a_plugin_file_is_loaded_once_and_its_parts_are_found(tmp_path: Path) -> None:
    file = tmp_path / "my_parts.py"
    file.write_text(PLUGIN.format(name="as_it_is"))
    assert [c.name for c in registry.load_plugin(file)] == ["as_it_is"]
    assert [c.name for c in registry.load_plugin(file)] == ["as_it_is"]  # a second run would be refused as double
    copy = tmp_path / "submitted" / file.name
    copy.parent.mkdir()
    copy.write_bytes(file.read_bytes())
    assert [c.name for c in registry.load_plugin(copy)] == ["as_it_is"]
    copy.write_text("# edited\n" + PLUGIN.format(name="as_it_is"))
    with pytest.raises(ConfigError, match="registered already"):
        registry.load_plugin(copy)
    assert str(file.resolve()) in registry.PLUGINS


@pytest.mark.parametrize("text", ["1 / 0", "def broken(:", "raise SystemError('x')"])
def test_a_plugin_that_fails_says_so_in_one_line(tmp_path: Path, text: str) -> None:
    file = tmp_path / "bad.py"
    file.write_text(text)
    with pytest.raises(ConfigError, match="plug-in failed to load"):
        registry.load_plugin(file)
    with pytest.raises(ConfigError, match="no such plug-in"):
        registry.load_plugin(tmp_path / "absent.py")


def test_the_registry_does_not_import_torch() -> None:
    code = "import sys, gpt2lab.registry; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
