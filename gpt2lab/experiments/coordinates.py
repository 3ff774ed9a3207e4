"""The coordinate check: how far activations, scores and logits move in a few steps, at several widths.

Under a parametrisation that transfers a learning rate across widths, they move as far at every width; under one that
does not, they move the further the wider the model is (arXiv:2203.03466, appendix D.1).

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

STEPS, SEEDS = 8, 3
SEQUENCES, LONGEST = 4, 128
"""Of a batch: as little as shows what is to be shown."""


class ActivationRecorder:
    """Looks on: the stream behind every block and the scores of its attention, as they are."""

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}

    def stream(self, depth: int, x: Tensor) -> None:
        """The stream as the block hands it on."""
        self.found[f"block {depth}"] = x

    def attention(self, depth: int, q: Tensor, k: Tensor, bias: Tensor, scores: Scores, scale: float) -> None:
        """Scores of the pairs that may see each other; a block may call more than one kernel."""
        made = score_map(q, k, bias, scores, scale)
        seen = self.found.get(f"scores {depth}", made.new_empty(0))
        self.found[f"scores {depth}"] = torch.cat([seen, made[(bias > -math.inf).expand_as(made)]])


def coordinate_check(
    configs: Sequence[Config], *, steps: int = STEPS, seeds: int = SEEDS, tokens: TokenSequence | None = None
) -> dict[str, Any]:
    """Train the model of each config for a few steps at its full rate, from the first step on, and look inside.

    configs: one per width, alike but for it (see `at_widths`, or the scales of a ladder).
    steps:   optimizer steps.
    seeds:   models of each width, from the config's own seed on; numbers are root mean squares over all of them.
    tokens:  to train on; None: those of the first config.

    Returns plain data, with null for what is not finite:
    {"widths": [n_embd of each config], "steps": [0, ..., steps], "seeds": [...], "lr": [of each config],
     "rms": {name: [one list per width, one value per step]}, "change": the same of what differs from step 0,
     "slopes": {name: slope of log change against log width after the last step}}
    where a name is `block <i>` (the stream behind it), `scores <i>` (of its attention) or `logits`. They are taken on a
    batch that is not trained on. There is no dropout, and global random state is left alone. Raises ConfigError for two
    configs of one width, or tokens too few for a batch.
    """
    widths = [config.model.n_embd for config in configs]
    if len(set(widths)) < len(widths) or not configs:
        raise ConfigError(f"a coordinate check needs models of different widths, not {widths}", where="model.n_embd")
    length = min(LONGEST, *(config.model.block_size for config in configs))
    train = prepare(configs[0].data).train if tokens is None else tokens
    batches = Batches(train, length, SEQUENCES, configs[0].seed)
    own = range(configs[0].seed, configs[0].seed + seeds)
    found = [joined([watched(config, seed, batches, steps) for seed in own]) for config in configs]
    rms, change = ({name: [one[kind][name] for one in found] for name in found[0][kind]} for kind in ("rms", "change"))
    return {
        "widths": widths,
        "steps": list(range(steps + 1)),
        "seeds": list(own),
        "lr": [config.optim.lr for config in configs],
        "rms": rms,
        "change": change,
        "slopes": {name: slope(widths, [one[-1] for one in values]) for name, values in change.items()},
    }


def at_widths(config: Config, widths: Sequence[int] | None = None) -> list[Config]:
    """The same config at other widths: heads keep their size, and their number follows. None: half of its own width
    where heads fit into it, else its own, and twice and four times that. Raises ConfigError where heads do not fit."""
    size = config.model.head_size
    if widths is None:
        least = config.model.n_embd // (2 if config.model.n_head % 2 == 0 else 1)
        widths = [least, 2 * least, 4 * least]
    uneven = [width for width in widths if width % size or width < size]
    if uneven:
        raise ConfigError(f"widths {uneven} are no multiples of a head's {size} channels", where="model.n_embd")
    return [config.with_changes({"model.n_embd": width, "model.n_head": width // size}) for width in widths]


Seen = dict[str, dict[str, list[float | None]]]
"""`rms` and `change`, each by name with one value per step."""


def watched(config: Config, seed: int, batches: Batches, steps: int) -> Seen:
    """One model."""
    device = choose_device(config.training.device)
    model = build_model(config.model, seed=seed, device=device).eval()  # without dropout
    optimizers = build_optimizers(config.optim, model.params())
    probe, _ = batches.at(steps)
    start = inside(model, torch.as_tensor(probe, device=device))
    found: Seen = {"rms": {}, "change": {}}
    for step in range(steps + 1):
        if step:
            advance(model, optimizers, batches, step - 1, config.optim.grad_clip)
        for name, now in (inside(model, torch.as_tensor(probe, device=device)) if step else start).items():
            found["rms"].setdefault(name, []).append(size_of(now))
            found["change"].setdefault(name, []).append(size_of(now - start[name]))
    return found


def joined(models: Sequence[Seen]) -> Seen:
    """Root mean squares over models of one width; None where one of them has None."""

    def one(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return math.sqrt(sum(v * v for v in known) / len(known)) if len(known) == len(values) else None

    return {
        kind: {name: [one(values) for values in zip(*(m[kind][name] for m in models), strict=True)] for name in named}
        for kind, named in models[0].items()
    }


def advance(model: GPT, optimizers: Sequence[Any], batches: Batches, step: int, grad_clip: float | None) -> None:
    """One update at the peak rate."""
    device = next(model.parameters()).device
    inputs, targets = (torch.as_tensor(x, device=device) for x in batches.at(step))
    model.zero_grad()
    model.objective(inputs, targets)[0].backward()
    if grad_clip is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    for optimizer in optimizers:
        optimizer.step()


@torch.no_grad()
def inside(model: GPT, tokens: Tensor) -> dict[str, Tensor]:
    """What one pass over `tokens` (B, T) shows, by name."""
    step, look = model.context(tokens), ActivationRecorder()
    step.observer = look
    rows = model.hidden(step).flatten(0, 1)  # (n, C)
    return {**look.found, "logits": model.lm_head(rows, model.wte)}


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
    found: float = sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points)
    return found
