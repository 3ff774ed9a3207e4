"""`deciding`: how many seeds the contrasts of a finished study need: all, three with moderated variances, one by one.
Nothing is trained: seeds are taken in random orders from those that the study has.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import typer

from benchmarks import options as o
from benchmarks.moderated import LIMMA, moderated
from gpt2lab.analysis import compare
from gpt2lab.analysis.judging import DECISIVE

FEWEST = 3


def deciding(
    losses: Annotated[Path, typer.Argument(help="results.csv of a study with equally many seeds of every arm.")],
    baseline: Annotated[str, typer.Argument(help="The arm that the others are compared with.")],
    smallest_effect: Annotated[float, typer.Option(help="X, the smallest difference that matters.", min=0)],
    orders: Annotated[int, typer.Option(help="Random orders of the seeds.", min=1)] = 400,
    alpha: Annotated[float, typer.Option(help="Chance of a false word in the family.", min=0, max=1)] = 0.05,
) -> None:
    """By contrast, the words with all seeds, and how often and with how many seeds each design comes to a word.

    The moderated test has the pooled variance of all seeds as its prior, which favours it; it finds differences only.
    """
    values = {str(arm): np.asarray(of["value"], float) for arm, of in pd.read_csv(losses).groupby("arm", sort=False)}
    most = min(map(len, values.values()))
    prior = float(np.sqrt(np.mean([of.var(ddof=1) for of in values.values()])))
    judged = partial(compare, baseline=baseline, smallest_effect=smallest_effect, alpha=alpha, sensitivity=False)
    dice, words, spent = np.random.default_rng(0), Counter[tuple[str, str, str]](), Counter[str]()
    for _ in range(orders):
        order = {arm: dice.permutation(of)[:most] for arm, of in values.items()}
        for contrast in judged(table(order, FEWEST)).contrasts:
            words["Welch", contrast.arm, contrast.word] += 1
        for contrast in judged(table(order, most), looks=range(FEWEST, most + 1)).contrasts:
            words["one by one", contrast.arm, contrast.word] += 1
            spent[contrast.arm] += contrast.look or most
        for arm in order.keys() - {baseline}:
            p = moderated(order[arm][None, :FEWEST] / prior, order[baseline][None, :FEWEST] / prior, LIMMA)[0]
            words["moderated", arm, "found" if p < alpha / (len(order) - 1) else "open"] += 1

    def share(design: str, arm: str) -> str:
        """Of orders in which the design decides, with the words."""
        counts = {word: count for (of, name, word), count in words.items() if (of, name) == (design, arm)}
        decided = {word: count for word, count in counts.items() if word.startswith((*DECISIVE, "found"))}
        return ", ".join(f"{word} {count / orders:.2f}" for word, count in decided.items()) or "never"

    few = f"n = {FEWEST}"
    shown = o.table_of(
        "", "difference", f"Welch, n = {most}", f"Welch, {few}", f"moderated, {few}", "one by one", "seeds"
    )
    for contrast in judged(table(values, most)).contrasts:
        arm = contrast.arm
        by_design = (share(design, arm) for design in ("Welch", "moderated", "one by one"))
        interval = f"{contrast.difference:+.4f} [{contrast.low:+.4f}, {contrast.high:+.4f}]"
        shown.add_row(arm, interval, contrast.word, *by_design, f"{spent[arm] / orders:.1f}")
    o.show(shown)


def table(order: dict[str, np.ndarray], count: int) -> pd.DataFrame:
    """The first `count` values of every arm, as the runs of a study."""
    rows = [(arm, seed, value) for arm, of in order.items() for seed, value in enumerate(of[:count])]
    return pd.DataFrame(rows, columns=["arm", "seed", "value"])
