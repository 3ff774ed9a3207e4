"""Names of metrics, and the direction and unit that a name tells."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

from gpt2lab.errors import ConfigError

LOSS, BITS = "val/loss", "val/bits_per_byte"
TARGET = re.compile(r"(tokens|steps|seconds) to val/loss (\S+)")


@dataclass(frozen=True, kw_only=True)
class MetricSpec:
    """How values are read."""

    higher_is_better: bool
    unit: str
    continuous: bool
    """whether two runs agree in all digits only if they are copies; a share of right answers is a count"""


LOWER = {
    **dict.fromkeys(("loss", "nll", "ce", "cross_entropy", "xent", "negative_log_likelihood"), "nats"),
    **dict.fromkeys(("bits_per_byte", "bpb"), "bits per byte"),
    **dict.fromkeys(("bits_per_character", "bits_per_char", "bpc"), "bits per character"),
    **dict.fromkeys(("bits_per_token", "bits_per_word"), "bits per token"),
    **dict.fromkeys(("perplexity", "ppl"), "perplexity"),
    **dict.fromkeys(("error", "error_rate", "err"), "error rate"),
    **{name: name for name in ("mse", "rmse", "mae", "wer", "cer", "ece", "brier")},
}
"""Metric -> unit; lower is better."""

HIGHER = {
    **dict.fromkeys(("accuracy", "acc", "acc_norm", "acc_top1", "acc_top5", "top1", "top5"), "accuracy"),
    **dict.fromkeys(("log_prob", "logprob", "log_probability", "log_likelihood", "loglikelihood"), "nats"),
    **dict.fromkeys(("exact_match", "em"), "exact match"),
    **dict.fromkeys(("tokens_per_second", "tokens_per_sec", "tok_per_sec"), "tokens per second"),
    **{name: name for name in ("f1", "mcc", "auc", "auroc", "bleu", "chrf", "rouge1", "rouge2", "rougel")},
    **{name: name for name in ("pass@1", "reward", "win_rate", "mfu")},
}
"""Metric -> unit; higher is better."""

CONTINUOUS = ("nats", "bits per byte", "bits per character", "bits per token", "perplexity")

PLAIN = MetricSpec(higher_is_better=False, unit="nats", continuous=True)
"""The column `value`: a loss in nats, as gpt2lab measures it."""

PERCENT = re.compile(r"[_ (]*(%|pct|percent|percentage)\)?$")
SPLIT = re.compile(r"(_(train|training|val|valid|validation|dev|eval|test|mean|avg|final|last|best|score))+$")
"""Suffixes that say where or how a metric was taken."""


def metric_spec(name: str) -> MetricSpec | None:
    """The reading of a metric such as `val/loss`, `eval_accuracy`, `acc,none` or `acc_pct`; None for an unknown one."""
    for part in reversed(re.split(r"[/,.:]", name.casefold().strip())):
        amount, percent = PERCENT.subn("", part)
        base = SPLIT.sub("", re.sub(r"[\s-]+", "_", amount.strip()))
        for names, higher in ((LOWER, False), (HIGHER, True)):
            matches = [metric for metric in names if f"_{base}".endswith(f"_{metric}")]
            if matches:
                unit = names[max(matches, key=len)]
                display_unit = "percentage points" if percent else unit
                return MetricSpec(higher_is_better=higher, unit=display_unit, continuous=unit in CONTINUOUS)
    return None


def reading_of(name: str | None, higher_is_better: bool | None, unit: str | None) -> MetricSpec:
    """How the metric is read: as given, else by its name. Raises ConfigError where neither gives the direction."""
    called = name or "value"
    by_name = PLAIN if called == "value" else metric_spec(called)
    if higher_is_better is None and by_name is None:
        problem = f"whether a higher or a lower '{called}' is better is not known"
        raise ConfigError(problem, hint="higher_is_better=True or higher_is_better=False")
    if by_name is None or (by_name is PLAIN and higher_is_better):
        by_name = MetricSpec(higher_is_better=bool(higher_is_better), unit=called, continuous=False)
    higher = by_name.higher_is_better if higher_is_better is None else higher_is_better
    return replace(by_name, higher_is_better=higher, unit=unit or by_name.unit)


def target_name(key: str, loss: float) -> str:
    """The metric of `tokens_to`, `steps_to` or `seconds_to`. Raises KeyError, ValueError."""
    if not 0 < loss < math.inf:
        raise ValueError(loss)
    what = {"tokens_to": "tokens", "steps_to": "steps", "seconds_to": "seconds"}[key]
    return f"{what} to {LOSS} {loss:g}"


def target_of(metric: str) -> tuple[str, float] | None:
    """(tokens, steps or seconds, the loss to be reached) of such a metric, else None."""
    match = TARGET.fullmatch(metric)
    return (match[1], float(match[2])) if match else None


def reading(metric: str) -> MetricSpec:
    """The reading of a study's primary metric; one whose name says nothing is read as a loss in nats."""
    if target := target_of(metric):
        return MetricSpec(higher_is_better=False, unit=target[0], continuous=False)
    return metric_spec(metric) or PLAIN
