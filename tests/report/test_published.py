"""What was published, which contrasts repeat it, and what a verdict says of it."""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import gpt2lab.config
import gpt2lab.optim  # registers optimizers and schedules
from gpt2lab.config.source import read_file
from gpt2lab.errors import ConfigError
from gpt2lab.records import StudyRecord
from gpt2lab.registry import SLOTS, Choice
from gpt2lab.reports.published import (
    PublishedEffect,
    agree,
    alike,
    expected_direction,
    matching,
    one_class,
    published,
    with_expected,
    with_published,
)

COMPONENT = re.compile(r"(\w+)(?:\((.*)\))?")
EFFECTS = published()


def as_recorded(slot: str, written: str) -> str:
    """The text that a study's record would hold for a component."""
    name, options = COMPONENT.fullmatch(written).groups()  # type: ignore[union-attr]
    given = dict(option.split("=") for option in options.split(", ")) if options else {}
    raw = {"name": name, **{key: value.lower() for key, value in given.items()}}
    read = SLOTS[slot].read(raw)
    assert isinstance(read, Choice)
    return str(read)


def arm(changes: dict[str, Any] | None = None, **components: str) -> dict[str, Any]:
    return {"changes": changes or {}, "components": {"position": "learned", "residual": "pre", **components}}


def study(parameters: float = 124e6, **more: Any) -> StudyRecord:
    scale = "nano" if parameters < 1e6 else "gpt2-124m"
    record = {
        "name": f"made@{scale}", "ablation": "made", "scale": scale, "question": "?", "baseline": "a", "arms": {},
        "contrasts": [["b", "a"]], "seeds": [0], "smallest_effect": 0.005, "alpha": 0.05, "evaluation": {"key": "k"},
        "scope": {"parameters": parameters},
    }  # fmt: skip
    return StudyRecord.read(record | more, "made up")


def found(ours: dict[str, Any], theirs: dict[str, Any]) -> list[PublishedEffect]:
    return matching(study(arms={"b": ours, "a": theirs}), "b", "a")


def contrast(word: str, reason: str | None = None) -> Any:
    return SimpleNamespace(word=word, reason=reason)


@pytest.mark.parametrize("effect", [e for e in EFFECTS if not e.is_setting], ids=str)
def test_every_component_is_one_that_records_can_name(effect: PublishedEffect) -> None:
    for written in (effect.component, effect.against):
        if not (effect.slot == "stack" and written == "none"):  # no entry in the list
            assert as_recorded(effect.slot, written) == written


@pytest.mark.parametrize("effect", [e for e in EFFECTS if e.is_setting], ids=str)
def test_every_setting_is_one_that_configs_have(effect: PublishedEffect) -> None:
    section, name = effect.slot.split(".")
    fields = gpt2lab.config.Config.model_fields[section].annotation.model_fields  # type: ignore[union-attr]
    assert name in fields
    assert all(as_recorded(slot, component) == component for slot, component in effect.given.items())


def test_components_that_count_as_another_exist() -> None:
    for slot, names in alike().items():
        assert {*names, *names.values()} <= set(SLOTS[slot].names())


def test_every_effect_names_its_source_and_on_what_it_was_measured() -> None:
    assert len(EFFECTS) > 30
    for effect in EFFECTS:
        assert effect.source and effect.setting
        assert effect.address == "" or effect.address.startswith(("https://arxiv.org/abs/", "https://github.com/"))
        assert effect.direction in (-1, 0, 1)
        assert effect.size is None or 0 <= effect.size < 1


def test_perplexities_become_nats() -> None:
    [small, large] = found(arm(position="alibi"), arm())
    assert small.size == pytest.approx(math.log(22.04 / 19.94))
    assert (small.direction, small.parameters, large.parameters) == (-1, 125e6, 1.3e9)
    assert "better (19.94 against 22.04 perplexity); 125M, the Pile" in str(small)


def test_measured_values_that_hardly_differ_are_no_difference() -> None:
    assert [effect.direction for effect in found(arm(position="none"), arm())] == [0, 0]


def test_an_effect_turns_round_with_its_contrast() -> None:
    [one, _] = found(arm(position="rotary"), arm())
    [other, _] = found(arm(), arm(position="rotary"))
    assert (one.direction, other.direction) == (-1, 1)
    assert (one.values, other.values) == ((2.759, 2.809), (2.809, 2.759))


def test_every_pair_of_a_measured_table_is_an_effect() -> None:
    assert [e.size for e in found(arm(position="rotary"), arm(position="t5_bias"))] == pytest.approx([0.042, 0.05])


def test_arms_that_differ_in_more_repeat_nothing() -> None:
    assert found(arm(position="rotary", residual="post"), arm()) == []
    assert found(arm({"optim.lr": "1e-3"}, position="rotary"), arm()) == []
    assert found(arm({"model.position": "rotary"}, position="rotary"), arm()) != []
    assert found(arm(position="rotary(fraction=0.25)"), arm()) == []
    assert found(arm(), arm()) == []


def test_the_tanh_form_counts_as_gelu() -> None:
    [effect] = found(arm(mlp="swiglu"), arm(mlp="gelu_tanh"))
    assert (effect.direction, effect.source) == (-1, "Shazeer 2020")
    assert found(arm(mlp="gelu"), arm(mlp="gelu_tanh")) == []


@pytest.mark.parametrize(("residual", "direction"), [("pre", 0), ("post", 1)])
def test_leaving_out_warm_up_depends_on_where_the_norms_sit(residual: str, direction: int) -> None:
    [effect] = found(arm({"optim.warmup_steps": "0"}, residual=residual), arm(residual=residual))
    assert (effect.direction, effect.source) == (direction, "Xiong et al. 2020")
    assert found(arm({"optim.warmup_steps": "10"}, residual=residual), arm(residual=residual)) == []


def test_settings_are_compared_as_what_they_mean() -> None:
    assert [e.direction for e in found(arm({"model.dropout": "1e-1"}), arm())] == [1]
    assert [e.direction for e in found(arm({"model.dropout": "0.0"}), arm({"model.dropout": "0.1"}))] == [-1]
    assert found(arm({"model.dropout": "0.2"}), arm({"model.dropout": "0.1"})) == []
    assert found(arm({"model.dropout": "0.1"}), arm({"model.dropout": "1e-1"})) == []
    assert [e.direction for e in found(arm({"optim.grad_clip": "~"}), arm())] == [0]


@pytest.mark.parametrize(
    "entry",
    ["{slot: mlp, component: a, against: b, direction: nicer, setting: x, source: y}",
     "{slot: mlp, component: a, against: b, direction: better, setting: x}"],
)  # fmt: skip
def test_an_effect_that_lacks_something_is_refused_with_its_place(entry: str, tmp_path: Path) -> None:
    (tmp_path / "effects.yaml").write_text(f"stated:\n  - {entry}\n")
    with pytest.raises(ConfigError, match=re.escape("effects.yaml: stated.0")):
        published(tmp_path / "effects.yaml")


AGREEMENTS = [
    # word, expected, size, same class -> kind, word shown at nano
    ("better", -1, None, True, "found again", "found again"),
    ("better (smaller than 0.05)", -1, None, True, "found again", "found again"),
    ("likely worse (noise borrowed)", 1, None, True, "found again", "found again"),
    ("better", -1, None, False, "found again", "same sign at nano"),
    ("worse", -1, 0.1, True, "contradicted", "contradicted"),
    ("likely better (noise borrowed)", 1, None, False, "contradicted", "other sign at nano"),
    ("no difference larger than 0.005", 0, None, True, "found again", "found again"),
    ("no difference larger than 0.005", 0, None, False, "found again", "no difference at nano either"),
    ("no difference larger than 0.005", -1, 0.005, True, "contradicted", "contradicted"),
    ("no difference larger than 0.005", 1, 0.004, True, "inconclusive", "too small to see"),
    ("no difference larger than 0.005", -1, None, True, "inconclusive", "not seen"),
    ("no difference larger than 0.005", -1, 0.1, False, "inconclusive", "not seen at nano"),
    ("worse", 0, None, True, "inconclusive", "not expected"),
    ("inconclusive: need about 4 more seeds per arm", -1, None, True, "inconclusive", "inconclusive"),
    ("exploratory", -1, 0.1, True, "inconclusive", "inconclusive"),
    ("unstable (1 of 8 failed)", 1, 0.1, True, "inconclusive", "inconclusive"),
    ("not comparable", -1, 0.1, False, "inconclusive", "inconclusive"),
]


@pytest.mark.parametrize(("word", "direction", "size", "same", "kind", "shown"), AGREEMENTS)
def test_the_rules_of_agreement(
    word: str, direction: int, size: float | None, same: bool, kind: str, shown: str
) -> None:
    said = agree(study(842e3), contrast(word), direction, size, same_class=same)
    assert (said.kind, said.word) == (kind, shown)


def test_a_verdict_that_decides_nothing_says_why() -> None:
    said = agree(study(), contrast("exploratory", "fewer than 3 seeds"), -1, None, same_class=True)
    assert said.why == "exploratory: fewer than 3 seeds"


def test_a_scale_that_shows_signs_only_never_finds_again() -> None:
    [effect, _] = found(arm(position="rotary"), arm())
    assert with_published(study(), contrast("better"), effect).word == "found again"
    early = study(caveat="early training: sign only")
    assert with_published(early, contrast("better"), effect).word == "same sign at gpt2-124m"
    assert with_published(study(842e3), contrast("worse"), effect).word == "other sign at nano"


def test_published_nats_say_nothing_of_bits_per_byte() -> None:
    [effect, _] = found(arm(position="rotary"), arm())
    none = contrast("no difference larger than 0.005")
    assert with_published(study(), none, effect).word == "contradicted"
    assert with_published(study(metric="val/bits_per_byte"), none, effect).word == "not seen"


def test_the_size_of_what_is_expected_is_read_off_its_words() -> None:
    better = contrast("better")
    assert with_expected(study(), better, "better: -0.05 at 125-150M", []).word == "found again"
    assert with_expected(study(), better, "better: -0.05 at 1.3B", []).word == "same sign at gpt2-124m"
    assert with_expected(study(842e3), better, "better", []).word == "found again"
    assert with_expected(study(), better, "who knows", []).kind == "inconclusive"


def test_no_difference_contradicts_an_expectation_whose_size_was_published_at_that_scale() -> None:
    effects = found(arm(position="rotary"), arm())
    none = contrast("no difference larger than 0.005")
    assert with_expected(study(), none, "better", effects).word == "contradicted"
    assert with_expected(study(), none, "better", []).word == "not seen"
    assert with_expected(study(), none, "worse", effects).word == "not seen"
    assert with_expected(study(12.3e6), none, "better", effects).word == "not seen"


def test_one_scale_class_is_at_most_twice_the_size() -> None:
    assert one_class(study(124e6), 248e6) and one_class(study(248e6), 124e6)
    assert not one_class(study(124e6), 249e6)
    assert not one_class(study(124e6), None)


def test_every_shipped_expectation_can_be_read() -> None:
    shipped = [
        (file.stem, name, expected)
        for file in sorted((Path(__file__).parents[2] / "ablations").glob("*.yaml"))
        for name, expected in (read_file(file).tree.get("expected") or {}).items()
    ]
    assert len(shipped) >= 12
    assert [entry for entry in shipped if expected_direction(entry[2]) is None] == []
    directions = {(file, name): expected_direction(expected) for file, name, expected in shipped}
    assert directions["posenc", "rotary"] == directions["posenc", "sinusoidal"] == -1
    assert directions["posenc", "none"] == directions["activation", "gelu"] == 0
    assert directions["norm_placement", "post"] == directions["norm_placement", "post_no_warmup"] == 1
