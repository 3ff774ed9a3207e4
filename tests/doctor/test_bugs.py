"""Every bug of the museum is caught: by a contract test, by the doctor, or by both; and what is sound is left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gpt2lab import testing
from gpt2lab.cli.catalogue import all_slots
from gpt2lab.config import load_config
from gpt2lab.doctor import examine
from gpt2lab.errors import ConfigError
from gpt2lab.optim.schedules import cosine
from gpt2lab.planning.ablation import load_ablation
from gpt2lab.registry import BUG, SLOTS, load_plugin, mistakes

FOLDER = Path(__file__).parents[2] / "ablations"
PLUGIN = FOLDER / "bugs.py"
IN_FOUR = "training.micro_batch_sequences=2"

# settings of each mistake -> what the doctor calls it
NAMED = {
    ("model.mask=leaky",): {"causality"},
    ("model.scores=unscaled",): {"attention_scale"},
    ("model.attention=softmax_over_queries",): {"causality", "softmax_rows"},
    ("model.objective=unshifted",): {"targets"},
    ("model.init=unscaled_residual",): {"residual_scaling"},
    ("model.head=untied", "model.init=tie_broken"): {"tie"},
    ("optim.optimizer=adamw_not_zeroed",): {"gradient"},
    (IN_FOUR, "model.objective=undivided"): {"accumulation"},
    ("optim.optimizer=adamw_decays_all",): {"decay"},
    (IN_FOUR, "optim.schedule=cosine_per_micro_batch"): {"learning_rate"},
}
# the mistake -> the contract tests that fail for it
CONTRACT = {
    "mask=leaky": {"check_no_look_ahead", "check_cached_equals_full"},
    "attention=softmax_over_queries": {"check_no_look_ahead", "check_cached_equals_full"},
    "optimizer=adamw_not_zeroed": {"check_gradients_untouched"},
    "schedule=cosine_per_micro_batch": {"check_schedule"},
}


@pytest.fixture(autouse=True)
def bugs(no_plugins_after: None) -> list[Any]:
    return load_plugin(PLUGIN)


@pytest.mark.parametrize("settings", NAMED, ids=lambda settings: settings[-1].partition("=")[2])
def test_the_doctor_names_it(settings: tuple[str, ...], trained: Any) -> None:
    found = examine(trained(*settings))
    assert {finding.name for finding in found.findings} - {"impossible_loss"} == NAMED[settings]
    assert all(finding.evidence and finding.causes for finding in found.findings)


def test_what_the_mistakes_are_compared_with_is_sound(trained: Any) -> None:
    for settings in ((), (IN_FOUR,), ("model.head=untied",)):
        found = examine(trained(*settings))
        assert not found.findings and found.unknown.keys() <= {"learned_nothing"}  # 60 steps are few


def test_the_contract_catches_what_it_can_see(bugs: list[Any]) -> None:
    caught = {
        str(case): {
            check.__name__ for check in testing.checks_for(case.slot) if testing.problem_of(check, case) is not None
        }
        for case in testing.cases(bugs)
    }
    assert {case: failed for case, failed in caught.items() if failed} == CONTRACT
    assert len(caught) == 10


def test_all_of_them_are_marked_and_nothing_of_ours_is(bugs: list[Any]) -> None:
    marked = {(c.slot, c.name) for slot in all_slots(None).values() for c in slot if BUG in c.tags}
    assert marked == {(c.slot, c.name) for c in bugs} and len(marked) == 10
    assert all(c.summary.startswith("BUG: ") and "In real code:" in c.doc and "Caught by:" in c.doc for c in bugs)


def test_every_mistake_is_an_arm() -> None:
    loaded = load_ablation(FOLDER / "bugs.yaml", scale="nano", plugins=[PLUGIN])
    configs = {name: arm.config for name, arm in loaded.arms.items()}
    wrong = {
        name: [f"{c.slot}={c.name}" for c in mistakes([*_choices(config.model), *_choices(config.optim)])]
        for name, config in configs.items()
    }
    assert wrong.pop("sound") == wrong.pop("accumulation") == []
    assert sorted(one for ones in wrong.values() for one in ones) == sorted(
        settings[-1].partition(".")[2] for settings in NAMED
    )
    for name, config in configs.items():  # the count that plug-ins get is that of the arm
        size, block = config.training.micro_batch_sequences, config.model.block_size
        options = [c.options["micro_batches"] for c in _choices(config.model) if "micro_batches" in c.options]
        options += [c.options["micro_batches"] for c in _choices(config.optim) if "micro_batches" in c.options]
        assert all(config.training.batch_tokens // block // size == n for n in options), name


def _choices(section: Any) -> list[Any]:
    values = [value for _, value in section]
    flat = [one for value in values for one in (value if isinstance(value, tuple) else (value,))]
    return [one for one in flat if hasattr(one, "slot")]


def test_a_tie_is_broken_only_where_there_are_two_matrices() -> None:
    with pytest.raises(ConfigError, match=r"tie_broken|untied"):
        load_config("nano", ["model.init=tie_broken"])
    load_config("nano", ["model.init=tie_broken", "model.head=untied"])


def test_the_schedule_is_the_right_one_four_times_as_fast() -> None:
    fast = SLOTS["schedule"].build(SLOTS["schedule"].read("cosine_per_micro_batch"), 100, 8)
    right = cosine(100, 8)
    assert [fast(step) for step in range(25)] == [right(4 * step) for step in range(25)]
    assert fast(99) == pytest.approx(0.1)


@pytest.mark.slow
def test_the_command_that_tests_plugins_fails_for_them(capsys: pytest.CaptureFixture[str]) -> None:
    from gpt2lab.cli import execute

    with pytest.raises(SystemExit) as ended:
        execute(["test-plugin", str(PLUGIN)], debug=False)
    assert ended.value.code == 2
    told = capsys.readouterr().out.splitlines()
    assert {line.partition(":")[0] for line in told if line[:1] != " " and ", 0 failed" not in line} == set(CONTRACT)
