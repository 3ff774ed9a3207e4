"""The coordinate check: the change of activations, scores and logits in a few steps, at several widths.

Under a parametrisation that transfers a learning rate across widths, the change is the same at every width; otherwise
it grows with the width (arXiv:2203.03466, appendix D.1).

Shapes: B sequences, T tokens, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gpt2lab.components.attend import score_map
from gpt2lab.components.scores import Scores
from gpt2lab.config import Config
from gpt2lab.data.batches import Batches, TokenSequence
from gpt2lab.data.shards import prepare
from gpt2lab.errors import ConfigError
from gpt2lab.model import GPT, build_model
from gpt2lab.optim.groups import build_optimizers
from gpt2lab.training.precision import choose_device
from gpt2lab.training.state import step_of

STEPS, SEEDS = 8, 3
SEQUENCES, LONGEST = 4, 128
"""Size of a batch."""


class ActivationRecorder:
    """Observer that records the stream after every block and the scores of its attention."""

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}

    def stream(self, depth: int, x: Tensor) -> None:
        """Record the stream after a block."""
        self.found[f"block {depth}"] = x

    def attention(self, depth: int, q: Tensor, k: Tensor, bias: Tensor, scores: Scores, scale: float) -> None:
        """Record the scores of unmasked pairs; a block may call more than one kernel."""
        scaled = score_map(q, k, bias, scores, scale)
        recorded = self.found.get(f"scores {depth}", scaled.new_empty(0))
        self.found[f"scores {depth}"] = torch.cat([recorded, scaled[(bias > -math.inf).expand_as(scaled)]])


def coordinate_check(
    configs: Sequence[Config], *, steps: int = STEPS, seeds: int = SEEDS, tokens: TokenSequence | None = None
) -> dict[str, Any]:
    """Train the model of each config for a few steps at its full rate, and measure activations, scores and logits.

    configs: one per width, otherwise equal (see `at_widths`, or the scales of a ladder).
    steps:   optimizer steps.
    seeds:   models of each width, from the config's own seed on; numbers are root mean squares over all of them.
    tokens:  to train on; None: those of the first config.

    Returns plain data, with null for non-finite values:
    {"widths": [n_embd of each config], "steps": [0, ..., steps], "seeds": [...], "lr": [of each config],
     "rms": {name: [one list per width, one value per step]}, "change": the same of the difference from step 0,
     "slopes": {name: slope of log change against log width after the last step}}
    where a name is `block <i>` (the stream after it), `scores <i>` (of its attention) or `logits`. They are measured on
    a batch that is not trained on, without dropout; global random state is unchanged. Raises ConfigError for two
    configs of one width, or too few tokens for a batch.
    """
    widths = [config.model.n_embd for config in configs]
    if len(set(widths)) < len(widths) or not configs:
        raise ConfigError(f"a coordinate check needs models of different widths, not {widths}", where="model.n_embd")
    length = min(LONGEST, *(config.model.block_size for config in configs))
    train = prepare(configs[0].data).train if tokens is None else tokens
    batches = Batches(train, length, SEQUENCES, configs[0].seed)
    seed_range = range(configs[0].seed, configs[0].seed + seeds)
    results = [joined([record_movement(config, seed, batches, steps) for seed in seed_range]) for config in configs]
    rms, change = (
        {name: [model[kind][name] for model in results] for name in results[0][kind]} for kind in ("rms", "change")
    )
    return {
        "widths": widths,
        "steps": list(range(steps + 1)),
        "seeds": list(seed_range),
        "lr": [config.optim.lr for config in configs],
        "rms": rms,
        "change": change,
        "slopes": {name: slope(widths, [by_step[-1] for by_step in values]) for name, values in change.items()},
    }


def at_widths(config: Config, widths: Sequence[int] | None = None) -> list[Config]:
    """The same config at other widths: heads keep their size, and their number follows. None: half of its width if
    heads fit, else its width; and twice and four times that. Raises ConfigError where heads do not fit."""
    size = config.model.head_size
    if widths is None:
        least = config.model.n_embd // (2 if config.model.n_head % 2 == 0 else 1)
        widths = [least, 2 * least, 4 * least]
    uneven = [width for width in widths if width % size or width < size]
    if uneven:
        raise ConfigError(f"widths {uneven} are no multiples of a head's {size} channels", where="model.n_embd")
    return [config.with_changes({"model.n_embd": width, "model.n_head": width // size}) for width in widths]


Movement = dict[str, dict[str, list[float | None]]]
"""`rms` and `change`, each by name with one value per step."""


def record_movement(config: Config, seed: int, batches: Batches, steps: int) -> Movement:
    """The movement of one model."""
    device = choose_device(config.training.device)
    model = build_model(config.model, seed=seed, device=device).eval()  # without dropout
    optimizers = build_optimizers(config.optim, model.params())
    probe, _ = batches.at(steps)
    start = observe(model, torch.as_tensor(probe, device=device))
    movement: Movement = {"rms": {}, "change": {}}
    for step in range(steps + 1):
        if step:
            advance(model, optimizers, batches, step - 1, config.optim.grad_clip)
        for name, now in (observe(model, torch.as_tensor(probe, device=device)) if step else start).items():
            movement["rms"].setdefault(name, []).append(size_of(now))
            movement["change"].setdefault(name, []).append(size_of(now - start[name]))
    return movement


def joined(models: Sequence[Movement]) -> Movement:
    """Root mean squares over models of one width; None where one of them has None."""

    def rms(values: Sequence[float | None]) -> float | None:
        finite = [value for value in values if value is not None]
        return math.sqrt(sum(v * v for v in finite) / len(finite)) if len(finite) == len(values) else None

    return {
        kind: {name: [rms(values) for values in zip(*(m[kind][name] for m in models), strict=True)] for name in named}
        for kind, named in models[0].items()
    }


def advance(model: GPT, optimizers: Sequence[Any], batches: Batches, step: int, grad_clip: float | None) -> None:
    """One update at the peak rate."""
    device = next(model.parameters()).device
    inputs, targets = (torch.as_tensor(x, device=device) for x in batches.at(step))

    def gradients() -> None:
        model.zero_grad()
        model.objective(inputs, targets)[0].backward()
        if grad_clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)

    gradients()
    for optimizer in optimizers:
        step_of(optimizer, gradients)


@torch.no_grad()
def observe(model: GPT, tokens: Tensor) -> dict[str, Tensor]:
    """Streams, scores and logits of one pass over `tokens` (B, T), by name."""
    step, observer = model.context(tokens), ActivationRecorder()
    step.observer = observer
    rows = model.hidden(step).flatten(0, 1)  # (n, C)
    return {**observer.found, "logits": model.lm_head(rows, model.wte)}


def size_of(x: Tensor) -> float | None:
    """Root mean square; None where it is not finite."""
    value = float(x.double().square().mean().sqrt())
    return value if math.isfinite(value) else None


def slope(widths: Sequence[int], values: Sequence[float | None]) -> float | None:
    """Of log value against log width, by least squares; None without two values above zero."""
    points = [(math.log(width), math.log(y)) for width, y in zip(widths, values, strict=True) if y]
    if len(points) < 2:
        return None
    x, y = (sum(column) / len(points) for column in zip(*points, strict=True))
    ratio: float = sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points)
    return ratio
