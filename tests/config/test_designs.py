"""Designs: the arms a file stands for and their contrasts, against weights worked out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt2lab.errors import ConfigError
from gpt2lab.planning.ablation import LoadedAblation, load_ablation

ARMS = "arms: {a: {}, b: {model.norm: rmsnorm}}\nbaseline: a\n"
HEAD = "ablation: mine\nquestion: Which one?\nbase: nano\n"


def loaded(tmp_path: Path, text: str, **given: Any) -> LoadedAblation:
    file = tmp_path / "mine.yaml"
    file.write_text(HEAD + text)
    return load_ablation(file, **given)


def refused(tmp_path: Path, text: str, **given: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, text, **given)
    return str(caught.value)


def test_leaving_one_part_out(tmp_path: Path) -> None:
    text = (
        "leave_one_out:\n  norm: {model.norm: rmsnorm}\n  act: {model.mlp: swiglu}\n  pos: {model.position: rotary}\n"
    )
    ablation = loaded(tmp_path, text)
    assert list(ablation.arms) == ["all", "without norm", "without act", "without pos"]
    assert (ablation.baseline, ablation.design) == ("all", "leave one out")
    whole, lacking = ablation.arms["all"], ablation.arms["without act"]
    assert whole.changes == {"model.norm": "rmsnorm", "model.mlp": "swiglu", "model.position": "rotary"}
    assert lacking.changes == {"model.norm": "rmsnorm", "model.position": "rotary"}
    assert str(lacking.config.model.mlp) != str(whole.config.model.mlp)
    assert [(c.arm, c.against) for c in ablation.contrasts] == [
        (name, "all") for name in ("without norm", "without act", "without pos")
    ]


def test_steps_add_up(tmp_path: Path) -> None:
    steps = ("norm: {model.norm: rmsnorm}", "act: {model.mlp: relu2, optim.lr: 1e-3}", "gate: {model.mlp: swiglu}")
    text = "cumulative:\n" + "".join(f"  {step}\n" for step in steps)
    ablation = loaded(tmp_path, text)
    assert (ablation.baseline, ablation.design) == ("start", "cumulative")
    assert {name: arm.changes for name, arm in ablation.arms.items()} == {
        "start": {},
        "norm": {"model.norm": "rmsnorm"},
        "act": {"model.norm": "rmsnorm", "model.mlp": "relu2", "optim.lr": "1e-3"},
        "gate": {"model.norm": "rmsnorm", "model.mlp": "swiglu", "optim.lr": "1e-3"},
    }
    assert [(c.arm, c.against) for c in ablation.contrasts] == [("norm", "start"), ("act", "norm"), ("gate", "act")]


def test_a_two_by_two_factorial_has_the_weights_of_a_textbook(tmp_path: Path) -> None:
    ablation = loaded(tmp_path, "factors:\n  model.norm: [layernorm, rmsnorm]\n  model.position: [learned, rotary]\n")
    assert list(ablation.arms) == ["layernorm+learned", "layernorm+rotary", "rmsnorm+learned", "rmsnorm+rotary"]
    assert ablation.baseline == "layernorm+learned"
    assert ablation.factors == {"norm": ("layernorm", "rmsnorm"), "position": ("learned", "rotary")}
    assert ablation.arms["rmsnorm+rotary"].changes == {"model.norm": "rmsnorm", "model.position": "rotary"}
    weights = {c.arm: [c.weights.get(name, 0) for name in ablation.arms] for c in ablation.contrasts}
    assert weights == {
        "norm=rmsnorm": [-0.5, -0.5, 0.5, 0.5],
        "position=rotary": [-0.5, 0.5, -0.5, 0.5],
        "norm=rmsnorm with position=rotary": [1, -1, -1, 1],
    }
    assert ablation.contrasts[0].against == "norm=layernorm"


def test_the_effects_of_a_three_by_two_by_two_factorial_are_those_of_least_squares(tmp_path: Path) -> None:
    """Dummy-coded cell means by ordinary least squares give the simple effects; ours are averages of these."""
    text = "factors:\n  model.norm: [layernorm, rmsnorm]\n  model.position: [learned, rotary, none]\n  drop:\n"
    ablation = loaded(tmp_path, text + "    plain:\n    dropped: {model.dropout: 0.1}\n")
    dice = np.random.default_rng(0)
    cells = dict(zip(ablation.arms, dice.normal(size=12), strict=True))
    mean = {tuple(name.split("+")): value for name, value in cells.items()}
    found = {c.arm: sum(w * cells[name] for name, w in c.weights.items()) for c in ablation.contrasts}
    norms, positions, drops = ablation.factors.values()
    assert len(found) == 1 + 2 + 1 + 2 + 1 + 2
    by_hand = np.mean([mean[n, "rotary", d] - mean[n, "learned", d] for n in norms for d in drops])
    assert found["position=rotary"] == pytest.approx(by_hand)
    by_hand = np.mean(
        [
            (mean["rmsnorm", p, "dropped"] - mean["layernorm", p, "dropped"])
            - (mean["rmsnorm", p, "plain"] - mean["layernorm", p, "plain"])
            for p in positions
        ]
    )
    assert found["norm=rmsnorm with drop=dropped"] == pytest.approx(by_hand)
    assert all(sum(c.weights.values()) == pytest.approx(0) for c in ablation.contrasts)


def test_components_with_options_are_levels_too(tmp_path: Path) -> None:
    text = "factors:\n  model.mask: [causal, {name: sliding_window, window: 8}]\n  model.position: [learned, rotary]\n"
    ablation = loaded(tmp_path, text)
    assert "sliding_window(window=8)+rotary" in ablation.arms
    assert ablation.arms["sliding_window(window=8)+learned"].config.model.mask[0].options["window"] == 8


WRONG = {
    "two designs": ("arms: {a: {}}\nleave_one_out: {b: {model.norm: rmsnorm}}\n", "one of `arms`, `leave_one_out`"),
    "no design": ("seeds: 3\n", "one of `arms`, `leave_one_out`, `cumulative` and `factors` is expected"),
    "an empty step": ("cumulative: {b: {}}\n", "cumulative.b: changes nothing"),
    "a step called start": ("cumulative: {start: {model.norm: rmsnorm}}\n", "is called `start` already"),
    "one part": ("leave_one_out: {b: {model.norm: rmsnorm}}\n", "at least two parts"),
    "an empty part": ("leave_one_out: {b: {}, c: {model.norm: rmsnorm}}\n", "nothing to leave out"),
    "one key in two parts": (
        "leave_one_out: {b: {model.norm: rmsnorm}, c: {model.norm: layernorm}}\n",
        "'model.norm' is changed by 'b' as well",
    ),
    "one level": ("factors: {model.norm: [rmsnorm], model.position: [learned, rotary]}\n", "at least two levels"),
    "no levels": ("factors: {model.norm: rmsnorm, model.position: [learned, rotary]}\n", "at least two levels"),
    "a level twice": (
        "factors: {model.norm: [rmsnorm, rmsnorm], model.position: [learned, rotary]}\n",
        "the same level twice",
    ),
    "one factor": ("factors: {model.norm: [layernorm, rmsnorm]}\n", "at least two factors"),
    "a baseline of its own": (
        "baseline: rmsnorm+learned\nfactors: {model.norm: [layernorm, rmsnorm], model.position: [learned, rotary]}\n",
        "the baseline of this design is 'layernorm+learned'",
    ),
    "a level that is unknown": (
        "factors: {model.norm: [layernorm, rmsnrom], model.position: [learned, rotary]}\n",
        "mine.yaml:4: factors.model.norm: unknown norm 'rmsnrom'; did you mean 'rmsnorm'?",
    ),
    "an unknown key in a part": (
        "leave_one_out:\n  a: {model.nrom: rmsnorm}\n  b: {model.position: rotary}\n",
        "mine.yaml:5: leave_one_out.a.model.nrom",
    ),
    "looks and other seeds": (ARMS + "looks: [3, 5]\nseeds: 4\n", "last look"),
    "looks that fall": (ARMS + "looks: [5, 3]\n", "rising numbers"),
    "a look too early": (ARMS + "looks: [2, 3]\n", "rising numbers"),
    "a bracket without one": (ARMS + "tune: {grid: {optim.lr: [0.5x, 2x, 4x]}}\n", "1 among them"),
    "a rate beside a bracket": (
        "arms: {a: {}, b: {optim.lr: 1e-3}}\nbaseline: a\ntune: {grid: {optim.lr: [0.5x, 1x, 2x]}}\n",
        "which `tune` is to find",
    ),
    "an unknown axis": (ARMS + "equalise: time\n", "wall_clock is expected"),
    "a knob that cannot": (ARMS + "equalise: {axis: parameters, by: tokens}\n", "cannot make parameters equal"),
    "a curve of one point": (ARMS + "budget_curve: [1]\n", "at least two different multiples"),
    "a curve of an unknown arm": (ARMS + "budget_curve: {budgets: [1, 2], arms: [bb]}\n", "unknown arm 'bb'"),
    "a ladder with an unknown rung": (ARMS + "scales: [nano, mikro]\n", "did you mean 'micro'?"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_design_that_means_nothing_is_refused(case: str, tmp_path: Path) -> None:
    text, said = WRONG[case]
    assert said in refused(tmp_path, text)


def test_a_factorial_needs_all_its_arms(tmp_path: Path) -> None:
    text = "factors: {model.norm: [layernorm, rmsnorm], model.position: [learned, rotary]}\n"
    assert "needs all of its arms" in refused(tmp_path, text, arms=["layernorm+learned", "rmsnorm+learned"])


def test_seeds_from_the_command_line_drop_the_looks(tmp_path: Path) -> None:
    text = ARMS + "looks: [3, 5, 8]\n"
    assert loaded(tmp_path, text).looks == (3, 5, 8)
    assert loaded(tmp_path, text).seeds == tuple(range(8))
    assert loaded(tmp_path, text, seeds=4).looks == ()
    assert loaded(tmp_path, text, seeds="auto").seeds is None


def test_a_rung_of_a_ladder_names_its_tokens_per_parameter(tmp_path: Path) -> None:
    text = ARMS + "scales: [nano, micro]\ntokens_per_parameter: 1\n"
    rung = loaded(tmp_path, text, scale="micro", overrides=["optim.lr=1e-3"])
    assert rung.scale == "micro-1tpp"
    assert rung.noise_command == "gpt2lab noise micro --tokens-per-parameter 1 --set optim.lr=1e-3"
