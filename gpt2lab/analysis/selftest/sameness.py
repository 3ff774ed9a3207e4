"""What must not change: under names and units, between the code for one study and for many, and on real results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt2lab.analysis.compare import compare
from gpt2lab.analysis.looks import declared_looks
from gpt2lab.analysis.selftest.noise import BANKS, SEEDS, Draws, X, noise, table
from gpt2lab.analysis.selftest.plans import words_at_looks
from gpt2lab.analysis.selftest.rows import ALPHA, Row, none_of
from gpt2lab.analysis.statistics import Array, Family
from gpt2lab.analysis.verdicts import Contrast, findings

Found = tuple[Family, NDArray[np.str_]]

MIXED = (-3.0, -1.0, 0.0, 3.0)
"""Shifts, in sd, among which every word occurs."""

FAR = 2000.0
"""Final losses lie about this many of their sds away from 0."""

MOST_TABLES, MOST_LOOKS = 300, 40
GOLDEN_X = 0.005
GOLDEN = {"mudd_skips": ("better", -0.0084), "fp8_mlp_down": ("no difference larger than 0.005", 0.0001)}
"""contrast -> the word, and the difference in nats to four places"""


def invariances(draws: Draws) -> Iterator[Row]:
    """Studies whose words or numbers change where only names, the zero or the sign of the loss changed."""
    for bank in BANKS:
        counts = [altered(draws, bank, n) for n in SEEDS]
        for check in counts[0]:
            yield none_of(check, sum(count[check] for count in counts), draws.count * len(SEEDS), bank)


def altered(draws: Draws, bank: str, n: int) -> dict[str, int]:
    """By what was done to them: how many studies were judged otherwise."""
    baseline, *arms = draws.studies("invariances", bank, n, shifts=MIXED)
    found = judged(baseline, arms)
    rng = draws.generator("relabelling", bank, n)
    relabelled = judged(rng.permuted(baseline, axis=-1), [rng.permuted(arm, axis=-1) for arm in arms])
    shifted = judged(baseline + FAR, [arm + FAR for arm in arms])
    reordered = picked(judged(baseline, arms[::-1]), slice(None, None, -1))
    there, back = judged(baseline, arms[:1]), judged(arms[0], [baseline])
    return {
        "seeds relabelled: changed": changed(found, relabelled),
        "all losses shifted: changed": changed(found, shifted),
        "arms in reverse order: changed": changed(found, reordered),
        "arm and baseline swapped: more than the sign": changed(there, turned(back)),
    }


def judged(baseline: Array, arms: Sequence[Array]) -> Found:
    return findings(baseline, arms, smallest_effect=X, alpha=ALPHA)


def picked(found: Found, which: slice) -> Found:
    """Some contrasts, in some order."""
    family, words = found
    return Family(**{f.name: getattr(family, f.name)[..., which] for f in fields(Family)}), words[..., which]


def turned(found: Found) -> Found:
    """The same findings with the sign of every difference turned."""
    family, words = found
    parts = np.char.partition(words, " ")
    parts[..., 0] = np.select([parts[..., 0] == "better", parts[..., 0] == "worse"], ["worse", "better"], parts[..., 0])
    ends: dict[str, Array] = {}
    for kind in ("", "raw_", "joint_", "same_"):
        low, high = (getattr(family, f"{kind}{end}") for end in ("low", "high"))
        ends |= {f"{kind}low": -high, f"{kind}high": -low}
    words = np.char.add(np.char.add(parts[..., 0], parts[..., 1]), parts[..., 2])
    return replace(family, difference=-family.difference, **ends), words


def changed(one: Found, other: Found) -> int:
    """Studies in which any word differs, or any number by more than rounding."""
    differs = (one[1] != other[1]).any(-1)
    for f in fields(Family):
        same = np.isclose(getattr(one[0], f.name), getattr(other[0], f.name), rtol=1e-6, atol=1e-9, equal_nan=True)
        differs |= ~same.all(-1)
    return int(differs.sum())


def agreement(draws: Draws) -> Iterator[Row]:
    """Contrasts of random studies of which `compare`, one by one, says other than `findings`, all at once."""
    rng = draws.generator("agreement")
    count = min(MOST_TABLES, draws.count // 10)
    pairs = [pair for _ in range(count) for pair in one_by_one(random_study(rng, int(rng.integers(3, 7))))]
    yield none_of("compare against findings: other word", sum(not same_word(c, w) for c, w, _ in pairs), len(pairs))
    yield none_of(
        "compare against findings: other number", sum(not same_numbers(c, f) for c, _, f in pairs), len(pairs)
    )
    count = min(MOST_LOOKS, draws.count // 100)
    seen = [pair for _ in range(count) for pair in looked_at(random_study(rng, SEEDS[-1]))]
    yield none_of("compare against findings, with looks: other word", sum(not same_word(*s) for s in seen), len(seen))


def random_study(rng: np.random.Generator, n: int) -> list[Array]:
    """A baseline and four arms of unequal noise, drawn from one of the banks, such that every word occurs.

    Repeats of one real run are told apart in the ninth digit: equal ones are refused as copies.
    """
    bank = BANKS[rng.integers(len(BANKS))]
    sds, shifts = rng.choice([0.2, 0.5, 1.0, 2.0], 5), rng.choice([-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0], 5)
    apart = 1e-9 * np.arange(n)
    return [shift + sd * noise(rng, bank, (n,)) + apart for shift, sd in zip(shifts, sds, strict=True)]


def one_by_one(arms: list[Array]) -> list[tuple[Contrast, str, dict[str, float]]]:
    """(what `compare` says, the word and the numbers of `findings`) for every contrast."""
    family, words = findings(arms[0], arms[1:], smallest_effect=X, alpha=ALPHA)
    numbers = [{f.name: float(getattr(family, f.name)[i]) for f in fields(Family)} for i in range(len(words))]
    contrasts = compare(as_rows(arms), baseline="0", smallest_effect=X, alpha=ALPHA).contrasts
    return list(zip(contrasts, map(str, words), numbers, strict=True))


def looked_at(arms: list[Array]) -> list[tuple[Contrast, str]]:
    words = words_at_looks([arm[None] for arm in arms], declared_looks(SEEDS, ALPHA))[0]
    contrasts = compare(as_rows(arms), baseline="0", smallest_effect=X, alpha=ALPHA, looks=SEEDS).contrasts
    return list(zip(contrasts, map(str, words), strict=True))


def as_rows(arms: list[Array]) -> list[dict[str, Any]]:
    return [{"arm": str(i), "seed": s, "value": float(v)} for i, arm in enumerate(arms) for s, v in enumerate(arm)]


def same_word(contrast: Contrast, word: str) -> bool:
    """Whether the word in full is that of `decide`, which leaves out what follows it."""
    full = {
        "better (smaller)": f"better (smaller than {X:g})",
        "worse (smaller)": f"worse (smaller than {X:g})",
        "no difference": f"no difference larger than {X:g}",
    }.get(word, word)
    return contrast.word.startswith("inconclusive: ") if word == "inconclusive" else contrast.word == full


def same_numbers(contrast: Contrast, numbers: dict[str, float]) -> bool:
    shared = [name for name in numbers if hasattr(contrast, name)]
    return bool(np.allclose([getattr(contrast, s) for s in shared], [numbers[s] for s in shared], rtol=1e-9, atol=0))


def golden(draws: Draws) -> Iterator[Row]:
    """Two public ablations at 124M parameters, whose answers are known."""
    for name, (word, difference) in GOLDEN.items():
        rows = [row for row in table("golden_contrasts.csv") if row["contrast"] == name]
        found = compare(rows, baseline="baseline", smallest_effect=GOLDEN_X, metric="val_loss").contrasts[0]
        # another word is another answer, whatever the number
        measured = found.difference if found.word == word else float("nan")
        yield Row(
            check=f"golden {name}: {word}", n=found.n_arm, measured=measured, reference=difference,
            low=difference - 0.00005, high=difference + 0.00005, note=found.verdict,
        )  # fmt: skip
