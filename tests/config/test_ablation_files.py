"""Ablation files: the shipped ones, arms, what is refused (E5 to E7 of FAULTS.md), what may only be exploratory."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt2lab.config import load_config
from gpt2lab.data.curricula import TrainingText, build_batches
from gpt2lab.data.files import data_home
from gpt2lab.errors import ConfigError
from gpt2lab.model import build_model
from gpt2lab.planning.ablation import load_ablation
from gpt2lab.registry import SLOTS

SHIPPED = sorted((Path(__file__).parents[2] / "ablations").glob("*.yaml"))
HEAD = "ablation: mine\nquestion: Which one?\nbase: nano\nbaseline: a\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "mine.yaml"


def problems(file: Path, text: str, **given: Any) -> list[str]:
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_ablation(file, **given)
    assert caught.value.exit_code == 2
    return [str(problem).removeprefix(str(file)) for problem in caught.value.problems]


def test_shipped_ablations_ask_what_they_should() -> None:
    assert {path.stem for path in SHIPPED} >= {
        "posenc",
        "norm_placement",
        "tied_head",
        "activation",
        "modern",
        "norm_x_position",
    }
    posenc = load_ablation(SHIPPED[[path.stem for path in SHIPPED].index("posenc")])
    assert list(posenc.arms) == ["learned", "rotary", "none", "sinusoidal", "alibi", "t5_bias"]
    assert posenc.arms["rotary"].config.evaluation.contexts == (0.5, 1, 2, 4) and posenc.judged_contexts == (2, 4)
    assert posenc.scale == "gpt2-124m" and posenc.smallest_effect == 0.005


@pytest.mark.usefixtures("no_plugins_after")
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
@pytest.mark.parametrize("scale", [None, "nano", "micro", pytest.param("gpt2-xl", marks=pytest.mark.slow)])
def test_shipped_ablations_load_at_every_scale(path: Path, scale: str | None) -> None:
    plugins = [own for own in (path.with_suffix(".py"),) if own.exists()]
    if path.stem == "bugs" and scale == "gpt2-xl":  # its micro-batches of 2 sequences are what that scale has already
        with pytest.raises(ConfigError, match=r"arms\.accumulation: is the same training as arm .sound."):
            load_ablation(path, scale=scale, plugins=plugins)
        return
    loaded = load_ablation(path, scale=scale, plugins=plugins)
    preset = load_config(scale or "gpt2-124m")
    assert loaded.name == path.stem and loaded.question.endswith("?")
    # several factors, small departures, and comparisons of spread need more seeds
    fewest = 3 if loaded.design == "one factor" else 5
    seeds = {"parts": range(5), "parts_repeated": range(3, 8), "noise_sources": range(10)}
    assert loaded.seeds == tuple(seeds.get(path.stem, range(fewest)))
    # the quickstart, the museum of mistakes, two that change the order of the text, and small departures
    shares_one_rate = path.stem in ("posenc", "bugs", "mixture", "parts", "parts_repeated", "noise_sources")
    assert (loaded.tune is None) == shares_one_rate
    if loaded.tune is not None:
        assert loaded.tune.multiples == (() if path.stem.endswith("_tuned") else (0.5, 1, 2))
    assert loaded.smallest_effect == preset.scale.smallest_effect or loaded.metric != "val/loss"
    baseline = loaded.arms[loaded.baseline].config
    assert loaded.design == "leave one out" or baseline.model == preset.model or path.stem == "tokenizer"
    # the arms of `precision` say theirs, because presets differ in it
    assert baseline.training == preset.training or path.stem == "precision"
    expected = {name: arm.expected for name, arm in loaded.arms.items()} | loaded.expected
    assert all(expected.get(contrast.arm) for contrast in loaded.contrasts if " with " not in contrast.arm)


@pytest.mark.usefixtures("no_plugins_after")
def test_each_arm_of_noise_sources_holds_one_source_fixed() -> None:
    path = SHIPPED[[path.stem for path in SHIPPED].index("noise_sources")]
    loaded = load_ablation(path, scale="nano", plugins=[path.with_suffix(".py")])
    text = partial(TrainingText, np.arange(50_000, dtype=np.uint16), 128, 8, 40)

    def drawn(arm: str, seed: int) -> tuple[float, list[int]]:
        config = loaded.arms[arm].config
        batches = build_batches(config.data.batches, text(seed))
        weights = build_model(config.model, seed=seed).state_dict()["wte.weight"]
        return float(weights.sum()), batches.at(3)[0][:, 0].tolist()

    for arm, same in (("both", (False, False)), ("order", (True, False)), ("weights", (False, True))):
        first, second = drawn(arm, 0), drawn(arm, 1)
        assert (first[0] == second[0], first[1] == second[1]) == same


def test_an_arm_is_the_scale_then_overrides_then_its_changes(file: Path) -> None:
    file.write_text(
        HEAD
        + "arms:\n  a:\n  b: {model.position: rotary, optim: {lr: 1e-3}}\n  c: {model.mask: {name: sliding_window}}\n"
        "evaluate: {contexts: [1, 2], tokens: 1280}\nseeds: [4, 7]\nexpected: {b: better}\nalpha: 0.1\nscreen: yes\n"
        "campaign: null\n"
    )
    loaded = load_ablation(
        file, overrides=["optim.lr=2e-3", "evaluation.tokens=2560", "model.mask=sliding_window", "model.mask.window=8"]
    )
    a, b, c = loaded.arms.values()
    assert (a.config.optim.lr, b.config.optim.lr) == (2e-3, 1e-3)
    assert a.config.evaluation.tokens == 2560 and c.config.evaluation.contexts == (1, 2)
    assert b.config.model.mask[0].options["window"] == 8 and c.config.model.mask[0].options["window"] is None
    assert b.changes == {"model.position": "rotary", "optim.lr": "1e-3"} and a.changes == {}
    assert (b.expected, a.expected, loaded.seeds, loaded.alpha, loaded.screen) == ("better", None, (4, 7), 0.1, True)
    assert loaded.campaign == ""
    assert [(c.arm, c.against) for c in loaded.contrasts] == [("b", "a"), ("c", "a")]
    assert {arm.config.seed for arm in loaded.arms.values()} == {0}


def test_scales_replace_the_base(file: Path) -> None:
    file.write_text(HEAD + "arms: {a: {}, b: {model.norm: rmsnorm}}\nsmallest_effect: {gpt2-medium: 0.1, nano: 0.2}\n")
    assert load_ablation(file).smallest_effect == 0.2
    medium = load_ablation(file, scale="gpt2-medium")
    assert (medium.scale, medium.smallest_effect) == ("gpt2-355m", 0.1)
    assert medium.arms["b"].config.model.n_layer == 24
    assert load_ablation(file, scale="micro").smallest_effect == 0.02  # not mentioned: the preset's own
    (file.parent / "tiny.yaml").write_text("extends: nano\nmodel: {n_layer: 2}\n")
    tiny = load_ablation(file, scale=str(file.parent / "tiny.yaml"))
    assert tiny.scale == "tiny" and tiny.arms["a"].config.model.n_layer == 2
    file.write_text(file.read_text().replace("base: nano", "base: tiny.yaml"))  # found beside the ablation
    assert load_ablation(file).scale == "tiny"


def test_values_and_names_mean_what_they_say(file: Path) -> None:
    file.write_text(
        HEAD.replace("baseline: a", "baseline: off")
        + "arms:\n  off: {}\n  0.5: {model.dropout: 0.5}\n  no: {optim.lr: 1e-6}\n"
    )
    loaded = load_ablation(file)
    assert list(loaded.arms) == ["off", "0.5", "no"] and loaded.arms["no"].config.optim.lr == 1e-6


def test_e6_names_that_differ_only_in_case_are_refused(file: Path) -> None:
    [problem] = problems(file, HEAD + "arms:\n  a: {}\n  Rms: {model.norm: rmsnorm}\n  rMS: {model.head: untied}\n")
    assert problem == ":8: arms.rMS: 'rMS' and 'Rms' (line 7) differ only in case"


def test_e7_an_arm_that_changes_nothing_is_refused_unless_it_is_a_control(file: Path) -> None:
    text = HEAD + (
        "arms:\n  a: {}\n  b: {}\n  c: {model.position: learned}\n  d: {model.norm: rmsnorm}\n"
        "  e: {model: {norm: rmsnorm}}\n  f: {training.log_every_steps: 5}\n"
        "  g: {model.position: [learned, none]}\n"
    )
    assert problems(file, text) == [
        ":7: arms.b: changes nothing; if that is meant, write `control: true`",
        ":8: arms.c: is the same training as arm 'a'; if that is meant, write `control: true`",
        ":10: arms.e: is the same training as arm 'd'; if that is meant, write `control: true`",
        ":11: arms.f: is the same training as arm 'a'; if that is meant, write `control: true`",
        ":12: arms.g: has other settings and computes the same as arm 'a'; if that is meant, write `control: true`",
    ]
    file.write_text(HEAD + "arms:\n  a: {}\n  b: {control: true}\n  c: {control: yes, model.position: learned}\n")
    loaded = load_ablation(file)
    assert [arm.control for arm in loaded.arms.values()] == [False, True, True]
    assert loaded.arms["b"].changes == {} and loaded.arms["b"].config == loaded.arms["a"].config


def test_control_is_true_or_false(file: Path) -> None:
    found = problems(file, HEAD + "arms:\n  a: {}\n  b: {control: maybe, model.norm: rmsnorm}\n")
    assert found == [":7: arms.b.control: 'maybe' does not fit: true or false is expected"]


def test_controls_draw_seeds_of_their_own_whichever_arms_are_chosen(file: Path) -> None:
    """Also the baseline may be one: two controls are an A/A study."""
    file.write_text(HEAD + "arms:\n  a: {control: true}\n  b: {model.norm: rmsnorm}\n  c: {control: true}\n")
    assert [arm.first_seed for arm in load_ablation(file).arms.values()] == [500, 0, 700]
    assert [arm.first_seed for arm in load_ablation(file, arms=["a", "c"]).arms.values()] == [500, 700]


def test_e5_errors_of_all_arms_come_in_one_pass_at_their_lines(file: Path) -> None:
    text = HEAD + (
        "arms:\n  a: {}\n  b: {model.position: rotray}\n  c:\n    model.norm: rmsnorm\n    model.n_head: 3\n"
        "  d: {optim: {warmup_steps: 9999}}\n  e: {model.mask: [causal, causal, causal]}\n  f: {modle.norm: x}\n"
        "seeds: 0\nexpected: {z: x}\nbaselin: a\n"
    )
    found = problems(file, text, overrides=["evaluation.tokens=1"])
    starts = [
        ":14: seeds: '0' does not fit: from 1 to 100 seeds are expected",
        ":15: expected.z: unknown arm 'z'",
        ":16: baselin: unknown key 'baselin'; did you mean 'baseline'?",
        "--set evaluation.tokens: 1 are too few",
        ":7: arms.b.model.position: unknown position 'rotray'; did you mean 'rotary'?",
        ":10: arms.c.model.n_head: n_embd 128 is no multiple of n_head 3",
        ":11: arms.d.optim.warmup_steps: 9999 steps of warm-up",
        ":12: arms.e.model.mask: a pattern of 3 does not fill 4 layers",
        ":13: arms.f.modle: unknown key 'modle'; did you mean 'model'?",
    ]
    assert len(found) == len(starts)
    for start, problem in zip(starts, found, strict=True):
        assert problem.startswith(start)
    assert not data_home().exists()


def test_a_clash_with_what_others_wrote_is_told_at_the_arm(file: Path) -> None:
    [problem] = problems(
        file,
        HEAD + "arms:\n  a: {}\n  b: {model.position: rotary}\n",
        overrides=["model.n_embd=12", "model.norm=layernorm"],
    )
    assert problem.startswith(":7: arms.b.model.position: rotary rotates pairs of channels, and a head has 3")


@pytest.mark.usefixtures("no_plugins_after")
def test_an_arm_is_the_cause_even_where_the_complaint_names_what_others_wrote(file: Path) -> None:
    def too_fast(section: Any, options: Any) -> list[str]:
        return ["too fast"] if section.lr > 0.1 else []

    @SLOTS["optimizer"].register("careful", source="a test", check=too_fast)
    def careful(params: Any, lr: float) -> None:
        """An optimizer that refuses large rates."""

    text = HEAD + "arms:\n  a: {}\n  b: {optim.lr: 0.2}\n"
    assert problems(file, text, overrides=["optim.optimizer=careful"]) == [":7: arms.b: optim.optimizer: too fast"]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("data.tokenizer: gpt2", "same tokens"),
        ("data: {validation_fraction: 0.1}", "same tokens"),
        ("evaluation.tokens: 256", "see `evaluate`"),
        ("scale.caveat: x", "whole ablation"),
        ("seed: 3", "see `seeds`"),
        ("repeat: 1", "see `seeds`"),
        ("model.block_size: 64", "one context length"),
        ("training.device: cpu", "one kind of device"),
        ("training.threads: 2", "as many threads"),
    ],
)
def test_what_all_arms_share_cannot_be_changed_by_one(file: Path, change: str, why: str) -> None:
    [problem] = problems(file, HEAD + f"arms:\n  a: {{}}\n  b: {{model.norm: rmsnorm, {change}}}\n")
    assert problem.startswith(":7: arms.b.") and "an arm cannot change this" in problem and why in problem


def test_tokens_are_equal_in_all_arms(file: Path) -> None:
    text = HEAD + (
        "arms:\n  a: {training.steps: 640}\n  b: {training.steps: 641}\n"
        "  c: {training.steps: 320, training.batch_tokens: 2048}\n"
    )
    assert problems(file, text) == [
        ":7: arms.b: trains on 656384 tokens, the baseline on 655360: `equalise: tokens` wants them equal"
    ]
    file.write_text(text + "equalise: flops\n")
    assert load_ablation(file).axis == "flops"  # then steps are what is adjusted


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("contrasts: [[b, x]]", "contrasts.0.1: unknown arm 'x'"),
        ("contrasts: [[b, b]]", "contrasts.0: 'b' against itself"),
        ("contrasts: [[a, b], [b, a]]", "contrasts.1: 'b' and 'a' are compared twice"),
        ("contrasts: [[b]]", "contrasts.0: ['b'] does not fit: a value is missing"),
        ("contrasts: []", "contrasts: an empty list"),
        ("contrasts: b", "contrasts: 'b' does not fit: a list is expected"),
        ("seed: 3", "seed: unknown key 'seed'; did you mean 'seeds'?"),
        ("seeds: [1, 1]", "each only once"),
        ("seeds: []", "at least one seed"),
        ("seeds: [-1]", "seeds are numbers from 0 to 99"),
        ("seeds: [500]", "those from 100 on serve other purposes"),
        ("seeds: 1000000000", "from 1 to 100 seeds"),
        ("seeds: few", "seeds: 'few' does not fit: a whole number or a list or 'auto' or null is expected"),
        ("seeds: [1, x]", "seeds.1: 'x' does not fit: a whole number is expected"),
        ("smallest_effect: {nanoo: 0.1}", "smallest_effect.nanoo: unknown scale 'nanoo'; did you mean 'nano'?"),
        ("smallest_effect: 0", "smallest_effect: '0' does not fit"),
        ("smallest_effect: {nano: -1}", "smallest_effect.nano: '-1' does not fit: it must be greater than 0"),
        ("alpha: 1", "alpha: '1' does not fit: it must be less than 0.5"),
        ("evaluate: {context: [1]}", "evaluate.context: unknown key 'context'; did you mean 'contexts'?"),
        ("evaluate: {contexts: [0.3]}", "no whole number of tokens"),
        ("evaluate: {contexts: [1, 2], judged_contexts: [4]}", "evaluate.judged_contexts: are some of `contexts`"),
        ("evaluate: {contexts: [2, 4], judged_contexts: [4]}", "evaluate.judged_contexts: are some of `contexts`"),
        ("expected: {bb: x}", "expected.bb: unknown arm 'bb'; did you mean 'b'?"),
        ("expected: [b]", "expected: ['b'] does not fit: keys with values are expected"),
    ],
)
def test_declarations_that_mean_nothing_are_refused_at_their_line(file: Path, line: str, told: str) -> None:
    [problem] = problems(file, HEAD + f"arms: {{a: {{}}, b: {{model.norm: rmsnorm}}}}\n{line}\n")
    assert problem.startswith(":6: ") and told in problem


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/b", ".hidden", "a@b", "", "x" * 65, "a b", "a.", "nul\\x"])
def test_names_that_are_no_file_names_are_refused(file: Path, name: str) -> None:
    text = HEAD.replace("ablation: mine", f"ablation: '{name}'") + "arms: {a: {}, b: {model.norm: rmsnorm}}\n"
    [problem] = problems(file, text)
    assert problem.startswith(":1: ablation: ")


@pytest.mark.parametrize("name", ["../x", "a,b", ".", " b", "b\\tc", "", "x" * 65])
def test_arm_names_that_could_do_harm_are_refused(file: Path, name: str) -> None:
    [problem] = problems(file, HEAD + f'arms: {{a: {{}}, "{name}": {{model.norm: rmsnorm}}}}\n')
    assert "an arm's name is printable text" in problem


def test_what_is_missing_is_told(file: Path) -> None:
    found = problems(file, "arms: {a: {}}\n")
    assert [problem.split(": ")[1] for problem in found] == ["ablation", "question", "base", "arms", "baseline"]
    [lonely, unknown] = problems(file, HEAD.replace("baseline: a", "baseline: aa") + "arms:\n  a: {}\n")
    assert "baseline: unknown arm 'aa'; did you mean 'a'?" in lonely and "at least one arm besides" in unknown
    [problem] = problems(file, HEAD.replace("nano", "nanoo") + "arms: {a: {}, b: {model.norm: rmsnorm}}\n")
    assert problem.startswith(":3: base: unknown preset 'nanoo'; did you mean 'nano'?")
    [problem] = problems(file, HEAD + "arms: {a: {}, b: {model.norm: rmsnorm}}\n", scale="nanoo")
    assert problem.startswith("--scale: unknown preset 'nanoo'; did you mean 'nano'?")
    many = "".join(f"  b{i}: {{optim.lr: 1e-{i}}}\n" for i in range(101))
    assert "an ablation compares at most 100" in problems(file, HEAD + "arms:\n  a: {}\n" + many)[0]


def test_arms_can_be_chosen(file: Path) -> None:
    text = (
        HEAD + "arms: {a: {}, b: {model.norm: rmsnorm}, c: {model.head: untied}}\ncontrasts: [[b, a], [c, b], [c, a]]\n"
    )
    file.write_text(text)
    loaded = load_ablation(file, arms=["c", "a"], seeds=2)
    assert list(loaded.arms) == ["a", "c"] and loaded.seeds == (0, 1)
    assert [(c.arm, c.against) for c in loaded.contrasts] == [("c", "a")]
    assert load_ablation(file, seeds=[5]).seeds == (5,)
    assert problems(file, text, arms=["b", "cc"])[0].startswith("--arms: unknown arm 'cc'; did you mean 'c'?")
    assert "must keep the baseline 'a'" in problems(file, text, arms=["b", "c"])[0]
    assert "at least one arm besides" in problems(file, text, arms=["a"])[0]
    assert problems(file, text, seeds=0) == ["--seeds: from 1 to 100 seeds are expected"]


@pytest.mark.parametrize(
    ("change", "moved"),
    [
        ("model.residual: post", "model.residual"),
        ("model.init: zero_projections", "model.init"),
        ("optim.lr: 1e-4", "optim.lr"),
        ("optim.warmup_steps: 0", "optim.warmup_steps"),
        ("optim.schedule: linear", "optim.schedule"),
        ("optim.optimizer.weight_decay: 0", "optim.optimizer"),
        ("training: {batch_tokens: 2048, steps: 320}", "training.batch_tokens"),
        ("model.position: rotary", None),
        ("model.init: gpt2, optim.grad_clip: 1, model.head: untied", None),  # the first two are what they were
    ],
)
def test_contrasts_that_move_the_best_rate_are_exploratory(file: Path, change: str, moved: str | None) -> None:
    file.write_text(HEAD + f"arms:\n  a: {{}}\n  b: {{{change}}}\n")
    loaded = load_ablation(file, overrides=["training.steps=640"])
    assert list(loaded.moves_rate("b")) == ([] if moved is None else [moved]) and loaded.moves_rate("a") == {}
