"""What the journal alone shows: losses, rates, sizes of steps."""

from __future__ import annotations

import itertools
import lzma
import math
import statistics

import numpy as np

from gpt2lab.doctor.findings import Finding, NotExamined
from gpt2lab.doctor.patient import Patient

LOSS, TRAIN, RATE = "val/loss", "train/loss", "train/lr"
LOGITS, MOVED = "diag/logit_rms", "diag/update_ratio"

BELOW_UNIFORM, ABOVE_UNIFORM = 0.1, 1.0
"""Nats around ln V within which the loss of a fresh model lies (the contract test of components says the same)."""
IMPOSSIBLE = 0.2
"""Of what xz needs for the same tokens: the best models that there are need about a third of it."""
COMPRESSED_TOKENS = 1 << 20
ENOUGH_STEPS, ENOUGH_SHARE = 300, 0.9
"""Of training, after which a model must have passed the frequencies of single tokens."""
GAP = 1.0
"""Nats by which validation lies above training when a run knows its text by heart."""
SMALLEST_MOVE, LARGEST_MOVE = 1e-6, 0.3
"""Of a step against the size of the weights; 1e-3 is usual for large models, a few percent for tiny ones."""
LEAST_WARMUP, EARLY = 5, 0.9
"""A warm-up of so many steps has not reached its peak before this share of it."""
LONG_AT_THE_END = 0.5
"""Of training, spent at the final rate."""


def diverged(patient: Patient) -> Finding | None:
    """Training ended because a number was not finite."""
    if patient.result.get("status") != "diverged":
        return None
    causes = ("a rate that is too high, or no warm-up", "no clipping", "half precision where numbers are too large")
    return Finding(name="diverged", severity="error", evidence=str(patient.result.get("reason")), causes=causes)


def loss_at_start(patient: Patient) -> Finding | None:
    """A fresh model knows nothing and claims nothing, so its first loss is near ln V."""
    losses = patient.series(LOSS)
    if patient.config.branch or 0 not in losses:
        raise NotExamined("no loss before the first step in its journal")
    loss, uniform = losses[0], math.log(patient.config.model.vocab_size)
    if uniform - BELOW_UNIFORM <= loss <= uniform + ABOVE_UNIFORM:
        return None
    rms = patient.series(LOGITS).get(0)
    predicted = f"; its logits, of rms {rms:.3f}, predict about {uniform + rms**2 / 2:.3f}" if rms is not None else ""
    evidence = f"the loss before the first step is {loss:.3f}, and ln V is {uniform:.3f}{predicted}"
    below = ("the model sees what it predicts", "the validation text is not that of the tokenizer")
    above = ("initial weights that are too large", "a missing last norm", "scores that are scaled twice")
    return Finding(name="loss_at_start", severity="error", evidence=evidence, causes=below if loss < uniform else above)


def impossible_loss(patient: Patient) -> Finding | None:
    """No model predicts text in a small part of the bits that a good compressor needs."""
    step, loss = patient.last(LOSS)
    validation = patient.data.validation
    ids = np.asarray(validation[: min(len(validation), COMPRESSED_TOKENS)])
    small = ids.astype(np.uint8 if patient.data.vocab_size <= 256 else np.uint16 if ids.max() < 1 << 16 else np.uint32)
    packed = 8 * len(lzma.compress(small.tobytes(), preset=6)) / len(ids) * math.log(2)  # nats per token
    if loss >= IMPOSSIBLE * packed:
        return None
    return Finding(
        name="impossible_loss",
        severity="error",
        evidence=f"the validation loss at step {step} is {loss:.3f} nats per token; xz needs {packed:.3f} for the same "
        f"text, and counting pairs of tokens reaches {patient.data.floors['bigram']:.3f}",
        causes=("the model sees what it predicts (see causality)", "validation text is part of the training text"),
    )


def learned_nothing(patient: Patient) -> Finding | None:
    """After some hundred steps a model must beat the frequencies of single tokens."""
    step, loss = patient.last(LOSS)
    if step < ENOUGH_STEPS or step < ENOUGH_SHARE * patient.config.training.steps:
        return None
    floor = patient.data.floors["unigram"]
    if loss < floor:
        return None
    return Finding(
        name="learned_nothing",
        severity="error",
        evidence=f"the validation loss at step {step} is {loss:.3f} nats; token frequencies alone reach {floor:.3f}",
        causes=("targets that are not the next token", "gradients that are not those of the batch", "a rate far off"),
    )


def train_gap(patient: Patient) -> Finding | None:
    """Validation far above training: the text is known by heart, or the two are not the same kind of text."""
    step, loss = patient.last(LOSS)
    recent = [value for s, value in patient.series(TRAIN).items() if 0.9 * step < s <= step]
    if not recent:
        raise NotExamined(f"no {TRAIN} near step {step} in its journal")
    trained = statistics.fmean(recent)
    if loss - trained < GAP:
        return None
    epochs = step * patient.config.training.batch_tokens / max(1, len(patient.data.train))
    return Finding(
        name="train_gap",
        severity="warning",
        evidence=f"at step {step} validation is at {loss:.3f} nats and training at {trained:.3f}, after {epochs:.1f} "
        "passes over the training text",
        causes=("too many passes over too little text", "validation text of another kind", "a loss that cheats"),
    )


def update_ratio(patient: Patient) -> Finding | None:
    """How far a step moves the weights, against their size."""
    ratios = [value for step, value in patient.series(MOVED).items() if step > patient.config.optim.warmup_steps]
    if not ratios:
        raise NotExamined(f"no {MOVED} after the warm-up in its journal")
    middle = statistics.median(ratios)
    if SMALLEST_MOVE <= middle <= LARGEST_MOVE:
        return None
    small = ("a rate that is far too low", "an optimizer that does not hold the weights that are trained")
    large = ("a rate that is far too high", "weights that shrink to nothing")
    return Finding(
        name="update_ratio",
        severity="warning",
        evidence=f"a step moves the weights by {middle:.1e} of their size; between {SMALLEST_MOVE:g} and "
        f"{LARGEST_MOVE:g} is usual",
        causes=small if middle < SMALLEST_MOVE else large,
    )


def learning_rate(patient: Patient) -> Finding | None:
    """The logged rate follows its schedule, rises through the whole warm-up, and does not end long before training."""
    optim, training = patient.config.optim, patient.config.training
    logged = patient.series(RATE)
    if not logged:
        raise NotExamined(f"no {RATE} in its journal")
    multiplier = optim.multiplier(training.steps)
    for step, rate in logged.items():
        wanted = optim.lr * multiplier(step - 1)
        if not math.isclose(rate, wanted, rel_tol=1e-6):
            evidence = f"the rate of step {step} was {rate:.4g}; {optim.schedule} says {wanted:.4g}"
            return _rate("error", evidence, "the schedule was changed or stepped at another place")
    rates = [multiplier(step) for step in range(training.steps)]
    top, bottom = max(rates), min(rates[optim.warmup_steps :] or rates)
    peak = rates.index(top) + 1
    turned = optim.warmup_steps >= LEAST_WARMUP and peak < EARLY * optim.warmup_steps
    still = len(list(itertools.takewhile(lambda rate: rate == rates[-1], reversed(rates))))
    idle = rates[-1] == bottom < top and still > LONG_AT_THE_END * training.steps
    if not turned and not idle:
        return None
    said = f"the warm-up is {optim.warmup_steps} steps, and the rate peaks at step {peak}"
    ending = f"it then stays at {optim.lr * rates[-1]:.3g} for the last {still} of {training.steps} steps"
    fast = f"; {optim.warmup_steps / peak:.1f} times too fast" if turned else ""
    return _rate("error" if turned else "warning", f"{said}; {ending}{fast}", "a schedule shorter than the training")


def _rate(severity: str, evidence: str, *causes: str) -> Finding:
    return Finding(
        name="learning_rate",
        severity="error" if severity == "error" else "warning",
        evidence=evidence,
        causes=("the schedule is stepped once per micro-batch or per device", *causes),
    )
