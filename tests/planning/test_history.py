"""What earlier declarations mean for a study: each rule on records that are made up, and which seeds have results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from gpt2lab.planning.record import history as history_of
from gpt2lab.planning.record import seeds_finished, with_history
from gpt2lab.records import Earlier, StudyRecord
from gpt2lab.store import Store

Record = dict[str, Any]
ARMS = {"a": "alpha", "b": "beta", "c": "gamma"}
PAIRS = [["b", "a"], ["c", "a"]]


def record(seeds: int | Sequence[int] = 3, arms: Mapping[str, str] = ARMS, **changed: Any) -> Record:
    """A declaration: by arm a hash of what it trains with."""
    return {
        "name": "mine", "hash": "1", "created": "then", "reproduce": "gpt2lab run mine.yaml", "baseline_seeds": None,
        "seeds": list(range(seeds)) if isinstance(seeds, int) else list(seeds), "looks": [], "contrasts": PAIRS,
        "smallest_effect": 0.05, "alpha": 0.05, "arms": {name: {"settings": own} for name, own in arms.items()},
    } | changed  # fmt: skip


def typed(declared: Record) -> StudyRecord:
    rest = {"ablation": "mine", "scale": "nano", "question": "?", "baseline": "a", "evaluation": {"key": "k"}}
    return StudyRecord.read(rest | declared, "a test")


def history(declared: Record, earlier: Sequence[Record]) -> dict[str, Any]:
    return history_of(typed(declared), [Earlier.read(past, "a test") for past in earlier]).plain()


def seen(*args: Any, finished: Sequence[int] | None = None, **changed: Any) -> Record:
    """The same as it is remembered, with results at all of its seeds unless said otherwise."""
    one = record(*args, **changed)
    one["arms"] = {name: entry["settings"] for name, entry in one["arms"].items()}
    return one | {"finished": one["seeds"] if finished is None else list(finished)}


def before_settings_were_remembered(seeds: int, **changed: Any) -> Record:
    """An entry as the first versions wrote it."""
    own = {"hash": "1", "created": "then", "reproduce": "gpt2lab run mine.yaml", "arms": list(ARMS)}
    return own | {"seeds": list(range(seeds)), "finished": list(range(seeds))} | changed


# Nothing was seen.


def test_without_results_everything_counts_as_it_is_declared() -> None:
    now = record(5, looks=[3, 5], baseline_seeds=8)
    as_declared = {
        "looks": [3, 5], "first_seeds": 5, "first_baseline": 8, "undeclared": None, "late": [], "late_contexts": [],
        "dropped": [],
        "smallest_effect": 0.05, "alpha": 0.05, "changed": [],
    }  # fmt: skip
    assert history(now, []) == as_declared
    assert history(now, [seen(3, finished=[])]) == as_declared


def test_other_recipes_under_the_same_name_tell_nothing() -> None:
    others = {"a": "another", "b": "beta", "c": "unlike"}  # one arm in common is no comparison
    assert history(record(6), [seen(3, others, smallest_effect=0.5)]) == history(record(6), [])


def test_fresh_seeds_alone_begin_anew() -> None:
    now = record([3, 4, 5, 6], smallest_effect=0.01, looks=[3, 4])
    assert history(now, [seen(3, smallest_effect=0.05)]) == history(now, [])


# Seeds.


def test_seeds_that_are_added_follow_those_of_the_first_declaration() -> None:
    found = history(record(6), [seen(3)])
    assert (found["first_seeds"], found["undeclared"]) == (3, None)
    assert found["changed"] == ["Seeds were added after 3 had results"]
    again = history(record(12), [seen(3), seen(6)])
    assert again["first_seeds"] == 3 and again["changed"] == found["changed"]


def test_a_study_that_is_stopped_and_written_anew_keeps_the_seeds_that_it_declared() -> None:
    """Three of five had results when its question was put otherwise: all five are still what was declared."""
    found = history(record(5), [seen(5, finished=[0, 1, 2])])
    assert (found["first_seeds"], found["undeclared"], found["changed"]) == (5, None, [])
    more = history(record(8), [seen(5, finished=[0, 1, 2])])
    assert more["first_seeds"] == 5 and more["changed"] == ["Seeds were added after 3 had results"]


def test_the_seeds_of_the_baseline_are_those_declared_first() -> None:
    assert history(record(6, baseline_seeds=20), [seen(3, baseline_seeds=9)])["first_baseline"] == 9


@pytest.mark.parametrize(
    ("seeds", "why"),
    [
        ([0, 1, 3], "seed 2 has results and is left out"),
        ([0, 3, 4, 5], "seeds 1 and 2 have results and are left out"),
        ([0, 1, 2, 4], None),
    ],
)
def test_leaving_out_seeds_that_have_results_is_a_choice_among_them(seeds: list[int], why: str | None) -> None:
    assert history(record(seeds), [seen(3)])["undeclared"] == why


def test_seeds_that_had_results_in_any_declaration_count() -> None:
    assert history(record(4), [seen(3), seen(6)])["undeclared"] == "seeds 4 and 5 have results and are left out"


def test_added_seeds_come_after_those_with_results() -> None:
    """Seeds count in the order of their numbers: one before the others would change which are the first three."""
    found = history(record([0, 4, 5, 6]), [seen([4, 5, 6])])
    assert found["undeclared"] == "added seeds must follow those that have results, up to 6"
    assert history(record([4, 5, 6, 7]), [seen([4, 5, 6])])["undeclared"] is None


def test_ending_before_the_first_look_is_a_choice_too() -> None:
    """Ten were declared; whoever stops at four because of what three have shown has looked after every seed."""
    found = history(record(4), [seen(10, finished=[0, 1, 2])])
    assert found["undeclared"] == "10 seeds were declared before results were there, and only 4 are now"
    assert history(record(10), [seen(10, finished=[0, 1, 2]), seen(4)])["undeclared"] is None
    looked = history(record(4), [seen(8, looks=[4, 8], finished=range(4))])
    assert (looked["undeclared"], looked["looks"]) == (None, [4, 8])
    short = history(record(3), [seen(8, looks=[4, 8], finished=range(3))])
    assert short["undeclared"] == "4 seeds were declared before results were there, and only 3 are now"


def test_two_seeds_decide_nothing_so_seeds_may_still_change_but_not_what_counts_as_an_effect() -> None:
    found = history(record(2, smallest_effect=0.01), [seen(5, finished=[0, 1])])
    assert (found["first_seeds"], found["undeclared"], found["smallest_effect"]) == (2, None, 0.05)
    assert "smallest effect of interest was changed to 0.01" in found["changed"][0]


def test_a_confirmation_on_fresh_seeds_may_be_added_to() -> None:
    first, fresh = seen(3, smallest_effect=0.05), seen([3, 4, 5], smallest_effect=0.02)
    found = history(record(range(3, 9), smallest_effect=0.02), [first, fresh])
    assert (found["first_seeds"], found["undeclared"], found["smallest_effect"]) == (3, None, 0.02)
    whole = history(record(6), [first, fresh])  # with all that there is, it goes on from the first
    assert (whole["first_seeds"], whole["undeclared"], whole["smallest_effect"]) == (3, None, 0.05)
    back = history(record(3), [first, fresh])
    assert back["undeclared"] == "seeds 3, 4 and 5 have results and are left out"


# What else was declared.


def test_looks_that_are_written_down_after_results_do_not_count() -> None:
    found = history(record(5, looks=[3, 5]), [seen(3)])
    assert (found["looks"], found["first_seeds"]) == ([], 3)
    told = "`looks` were written down after 3 seeds had results, and do not count as declared"
    assert found["changed"] == ["Seeds were added after 3 had results", told]


@pytest.mark.parametrize("later", [[], [4, 6, 8]])
def test_looks_that_were_declared_count_though_they_are_changed_or_left_out(later: list[int]) -> None:
    found = history(record(8, looks=later), [seen(8, looks=[4, 8], finished=range(4))])
    assert found["looks"] == [4, 8]
    told = "`looks` were changed after 4 seeds had results; those that count are 4 and 8"
    assert found["changed"] == [told]


def test_the_smallest_effect_and_alpha_are_those_of_the_first_declaration() -> None:
    found = history(record(6, smallest_effect=0.2, alpha=0.1), [seen(3), seen(3, smallest_effect=0.1)])
    assert (found["smallest_effect"], found["alpha"]) == (0.05, 0.05)
    assert found["changed"][1:] == [
        "The smallest effect of interest was changed to 0.2 after results were there; it counts as 0.05",
        "alpha was changed to 0.1 after results were there; it counts as 0.05",
    ]


def test_contrasts_that_are_left_out_stay_in_the_family() -> None:
    found = history(record(3, {"a": "alpha", "b": "beta"}, contrasts=[["b", "a"]]), [seen(3)])
    assert found["dropped"] == [["c", "a"]]
    told = "1 contrast with results left out, still counted in the family: c against a"
    assert found["changed"] == [told]
    effect = {"arm": "norm=rmsnorm", "against": "norm=layernorm", "weights": {"b": 1.0, "a": -1.0}}
    both = history(record(3), [seen(3, contrasts=[effect, *PAIRS]), seen(3, contrasts=[effect])])
    assert both["dropped"] == [["norm=rmsnorm", "norm=layernorm"]]


def test_a_contrast_of_arms_whose_results_were_there_is_late_and_one_of_a_new_arm_is_not() -> None:
    now = record(3, ARMS | {"d": "delta"}, contrasts=[*PAIRS, ["c", "b"], ["d", "a"]])
    assert history(now, [seen(3)])["late"] == [["c", "b"]]
    other = record(3, ARMS | {"c": "trained otherwise"}, contrasts=[["b", "a"], ["c", "b"]])
    assert history(other, [seen(3)])["late"] == []  # these results were not there


# Records of former versions.


def test_records_that_remember_names_alone_are_read_by_them() -> None:
    found = history(record(6), [before_settings_were_remembered(3)])
    assert (found["first_seeds"], found["undeclared"], found["late"], found["dropped"]) == (3, None, [], [])
    assert (found["smallest_effect"], found["alpha"]) == (0.05, 0.05)
    assert (
        history(record(4), [before_settings_were_remembered(5)])["undeclared"] == "seed 4 has results and is left out"
    )
    strangers = before_settings_were_remembered(3, arms=["a", "x", "y"])
    assert history(record(6), [strangers]) == history(record(6), [])
    assert history(record(6), [before_settings_were_remembered(3) | {"finished": []}]) == history(record(6), [])


def test_looks_of_which_such_a_record_knows_nothing_are_not_taken_as_declared() -> None:
    assert history(record(5, looks=[3, 5]), [before_settings_were_remembered(3)])["looks"] == []


# From the store.


def with_runs(one: Record, finished: Mapping[str, int], store: Store, seeds: int = 3) -> Record:
    """The record with runs, of which the first so many of each arm have a result."""
    for name, entry in one["arms"].items():
        entry["runs"] = {str(seed): f"{ord(name) * 100 + seed:016x}" for seed in range(seeds)}
        for seed in range(finished.get(name, 0)):
            store.run(entry["runs"][str(seed)]).finish({"status": "finished"})
    return one


def compared(one: Record, store: Store) -> list[int]:
    return seeds_finished(typed(one), store)


def test_seeds_at_which_two_arms_have_results_may_have_been_compared(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert compared(with_runs(record(3), {"a": 3, "b": 2, "c": 0}, store), store) == [0, 1]


def test_an_arm_with_seeds_of_its_own_has_them_in_the_place_of_the_studys(tmp_path: Path) -> None:
    store = Store(tmp_path)
    one = with_runs(record([5, 6], {"a": "alpha", "b": "beta"}), {"a": 1, "b": 2}, store, seeds=2)
    assert compared(one, store) == [5]


def test_more_seeds_of_the_baseline_are_not_taken_for_those_of_the_arms(tmp_path: Path) -> None:
    """The baseline has seeds 0 and 1 beside the study's 5 and 6."""
    store = Store(tmp_path)
    one = with_runs(record([5, 6], {"a": "alpha", "b": "beta"}), {"a": 2, "b": 2}, store, seeds=4)
    for name, seeds in (("a", (0, 1, 5, 6)), ("b", (5, 6))):
        runs = one["arms"][name]["runs"].values()
        one["arms"][name]["runs"] = {str(seed): run for seed, run in zip(seeds, runs, strict=False)}
    assert compared(one, store) == []
    store.run(one["arms"]["a"]["runs"]["6"]).finish({"status": "finished"})
    assert compared(one, store) == [6]


def test_the_same_declaration_again_keeps_its_date_and_another_remembers_it(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first = with_history(typed(with_runs(record(3), {"a": 3, "b": 3}, store)), store)
    assert first.earlier == [] and first.history is not None and first.history.plain() == history(record(3), [])
    store.write_study(first)
    again = with_history(typed(record(3, created="now")), store)
    assert (again.created, again.earlier) == ("then", [])
    other = with_history(typed(record(6, hash="2", created="now")), store)
    [kept] = other.earlier
    assert other.created == "now" and kept.created == "then" and kept.hash == "1"
    assert (kept.finished, kept.arms, kept.contrasts) == ([0, 1, 2], ARMS, PAIRS)
    assert other.history is not None and other.history.first_seeds == 3


def test_contexts_judged_only_after_results_were_there_are_late() -> None:
    now = record(3, judged_contexts=[2, 4])
    assert history(now, [seen(3, judged_contexts=[2, 4])])["late_contexts"] == []
    assert history(now, [seen(3, judged_contexts=[2])])["late_contexts"] == [4]
    assert history(now, [seen(3)])["late_contexts"] == [2, 4]
    assert history(now, [seen(3, finished=[])])["late_contexts"] == []
