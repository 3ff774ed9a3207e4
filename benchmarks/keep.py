"""`keep`: what a loop keeps that trains each change once, and what it keeps by verdicts over a campaign.

Twenty changes of a model much smaller than nano are trained with many seeds, all in this process; the truth of each is
its difference over seeds that no rule sees. Or campaigns are simulated, whose truth is known. A rule then goes through
the changes in their order, on its own seeds:

once       keep what has a lower loss than the baseline, each trained with one seed (averaged over the seeds)
verdict    keep what is called better, in studies of four changes
campaign   keep of those what the campaign's level supports as well
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks import options as o
from gpt2lab.analysis import compare
from gpt2lab.analysis.online import levels
from gpt2lab.analysis.selftest import REAL, noise
from gpt2lab.analysis.statistics import welch
from gpt2lab.basics.output import console_for
from gpt2lab.cli.options import table_of
from gpt2lab.executors.inline import InlineExecutor

CHANGES: Mapping[str, dict[str, Any]] = {
    "rotary": {"model.position": "rotary"}, "alibi": {"model.position": "alibi"},
    "kerple": {"model.position": "kerple"}, "sinusoidal": {"model.position": "sinusoidal"},
    "rmsnorm": {"model.norm": "rmsnorm"}, "scale_norm": {"model.norm": "scale_norm"}, "dyt": {"model.norm": "dyt"},
    "gelu": {"model.mlp": "gelu"}, "relu": {"model.mlp": "relu"}, "silu": {"model.mlp": "silu"},
    "relu2": {"model.mlp": "relu2"}, "swiglu": {"model.mlp": "swiglu"}, "mqa": {"model.attention": "mqa"},
    "qk_norm": {"model.scores.qk_norm": True}, "head_gate": {"model.scores": "head_gate"},
    "off_by_one": {"model.scores": "off_by_one"}, "xsa": {"model.scores": "xsa"},
    "smear": {"model.embedding": ["plain", "smear"]}, "untied": {"model.head": "untied"},
    "no_bias": {"model.bias": False},
}  # fmt: skip
"""In the order in which a loop tries them."""
SMALL = (
    "model.n_layer=2", "model.n_head=2", "model.n_embd=32", "model.block_size=32", "training.batch_tokens=512",
    "training.checkpoint_every_steps=100000", "evaluation.every_steps=100000", "evaluation.tokens=8192",
    "evaluation.context_tokens=256", "evaluation.diagnostics=[]", "optim.warmup_steps=20",
)  # fmt: skip
EFFECTS = (-2.0, -4.0, -8.0, -16.0, 2.0, 4.0, 8.0, 16.0, *(0.0,) * 12)
"""True differences of the changes in simulated campaigns, in sd between seeds; negative is better."""
TOGETHER = 4
BASELINE = "baseline"

Losses = Mapping[str, np.ndarray[Any, np.dtype[np.float64]]]
"""arm -> (seed,)"""


@dataclass(frozen=True)
class Kept:
    """What a rule keeps. `false`: of these, changes that are no better in truth; `missed`: better ones that it does
    not keep; both on average where the rule has several seeds to choose from. `runs`: that it trains."""

    rule: str
    kept: float
    false: float
    missed: float
    runs: int


def keep(
    seeds: Annotated[int, typer.Option("--seeds", help="Seeds of the rules.", min=3, max=20)] = 5,
    truth: Annotated[int, typer.Option("--truth", help="Further seeds, which say what is true.", min=5, max=50)] = 10,
    steps: Annotated[int, typer.Option("--steps", help="Training steps of a run.", min=20)] = 100,
    runs: Annotated[Path, typer.Option("--runs", help="Folder of the runs, kept for another call.")] = Path(
        "runs-keep"
    ),
    simulate: Annotated[
        int, typer.Option("--simulate", help="Train nothing: so many campaigns with the noise of 124M seeds.", min=0)
    ] = 0,
    json_: o.Json = False,
) -> None:
    """What single runs keep of 20 changes, and what verdicts keep, beside the truth."""
    if simulate:
        truths, rules = dict(zip(CHANGES, EFFECTS, strict=True)), simulated(simulate, seeds)
        better = {name for name, size in truths.items() if size < 0}
        about = f"by construction, in sd between seeds; {simulate} campaigns"
    else:
        losses = trained(seeds + truth, steps, runs)
        test = {name: welch(losses[name][seeds:], losses[BASELINE][seeds:]) for name in CHANGES}
        truths = {name: float(result.difference) for name, result in test.items()}
        better = {name for name in CHANGES if truths[name] < 0 and float(test[name].p) < 0.05}
        rules = judged({name: arm[:seeds] for name, arm in losses.items()}, better)
        about = f"{truth} further seeds, p < 0.05"
    if json_:
        print(
            json.dumps({"differences": truths, "better": sorted(better), "rules": [asdict(r) for r in rules]}, indent=1)
        )
        return
    console = console_for()
    console.print(
        f"{len(better)} of {len(CHANGES)} changes are better in truth ({about})", markup=False, highlight=False
    )
    rows = [
        (rule.rule, f"{rule.kept:.3g}", f"{rule.false:.3g}", f"{rule.missed:.3g}", f"{rule.runs}") for rule in rules
    ]
    columns = ("kept", "false", "missed", "runs")
    console.print(table_of("rule", *columns, rows=rows, right=columns))


def simulated(campaigns: int, seeds: int) -> list[Kept]:
    """The rules on average over campaigns whose changes have the differences EFFECTS, in a random order, with the noise
    of a bank of final losses of one recipe at 124M; the jitter keeps draws of one loss apart."""
    rng = np.random.default_rng(0)
    found = list[list[Kept]]()
    for _ in range(campaigns):
        sizes = dict(zip(CHANGES, rng.permutation(EFFECTS), strict=True))
        losses = {
            name: size + noise(rng, REAL, (seeds,)) + 1e-6 * rng.standard_normal(seeds)
            for name, size in {BASELINE: 0.0, **sizes}.items()
        }
        found.append(judged(losses, {name for name, size in sizes.items() if size < 0}))
    return [
        replace(
            rules[0],
            **{key: float(np.mean([getattr(rule, key) for rule in rules])) for key in ("kept", "false", "missed")},
        )
        for rules in zip(*found, strict=True)
    ]


def trained(seeds: int, steps: int, runs: Path) -> Losses:
    """The final losses of the baseline and of every change."""
    from gpt2lab import api

    source = {
        "ablation": "keep", "question": "Which of twenty changes are better?", "base": "nano", "baseline": BASELINE,
        "arms": {BASELINE: {}, **CHANGES}, "screen": True,
    }  # fmt: skip
    result = api.run_ablation(
        source, seeds=seeds, overrides=(*SMALL, f"training.steps={steps}"), runs=runs, tracking=False,
        executor=InlineExecutor(),
    )  # fmt: skip
    frame = result.losses.sort_values("seed")
    return {str(arm): rows["value"].to_numpy(np.float64) for arm, rows in frame.groupby("arm")}


def judged(found: Losses, better: set[str]) -> list[Kept]:
    """What every rule keeps."""
    return [once(found, better), *by_verdicts(found, better)]


def once(found: Losses, better: set[str]) -> Kept:
    """One run of each: keep what has a lower loss than the baseline's run of that seed."""
    seeds = len(found[BASELINE])
    counts = [
        count({name for name in CHANGES if found[name][seed] < found[BASELINE][seed]}, better) for seed in range(seeds)
    ]
    kept, false, missed = np.mean(counts, axis=0).tolist()
    return Kept("once", kept, false, missed, len(CHANGES) + 1)


def by_verdicts(found: Losses, better: set[str]) -> list[Kept]:
    """Studies of four changes, one after the other: what is called better, and what the campaign supports of that."""
    called, supported = list[str](), list[str]()
    known, discoveries = list[int](), list[int]()
    names = list(CHANGES)
    for start in range(0, len(names), TOGETHER):
        arms = names[start : start + TOGETHER]
        rows = [{"arm": arm, "seed": seed, "value": float(value)}
                for arm in (BASELINE, *arms) for seed, value in enumerate(found[arm])]  # fmt: skip
        verdicts = compare(rows, baseline=BASELINE, smallest_effect=0.05, sensitivity=False)
        allowed = levels(start + 1, len(arms), known, discoveries)
        now = [c for c in verdicts.contrasts if c.word.startswith("better")]
        held = [c.arm for c in now if c.p <= allowed[arms.index(c.arm)]]
        claims = [c for c in verdicts.contrasts if c.word.startswith(("better", "worse"))]
        new = sum(c.p <= allowed[arms.index(c.arm)] for c in claims)
        known, discoveries = [*known, start + len(arms)], [*discoveries, new]
        called += [c.arm for c in now]
        supported += held
    runs = len(found[BASELINE]) * (len(CHANGES) + 1)
    rules: Sequence[tuple[str, list[str]]] = (("verdict", called), ("campaign", supported))
    counts = [(rule, count(set(kept), better)) for rule, kept in rules]
    return [Kept(rule, kept, false, missed, runs) for rule, (kept, false, missed) in counts]


def count(kept: set[str], better: set[str]) -> tuple[int, int, int]:
    """Kept, false among them, and missed."""
    return len(kept), len(kept - better), len(better - kept)
