"""How likely a model holds continuations to be: tokens, batches by length, sums of log-likelihoods.

Rows of a batch are padded on the right, where a causal model does not look. Only continuations pass the head.
Shapes: B rows of a batch, T tokens, C channels, V vocabulary, r targets.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gpt2lab.data.tokenizers import Tokenizer
from gpt2lab.errors import ConfigError
from gpt2lab.evaluation.tasks.asking import Answer, Request
from gpt2lab.evaluation.validation import evaluating
from gpt2lab.model import GPT
from gpt2lab.training.distributed import ALONE, World
from gpt2lab.training.precision import Precision, autocast, memory_guard

TOKENS_AT_ONCE = {"cpu": 4_096}
GPU_TOKENS_AT_ONCE = 32_768
TARGETS_AT_ONCE = 1024  # rows of logits in float32 together: 200 MB with GPT-2's vocabulary


class Encoded(NamedTuple):
    """A request as token ids; neither part is empty."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


class Line(NamedTuple):
    """What the model reads, and how many targets end it, by the request that they answer. `targets` follow the last
    `len(targets)` of `tokens`."""

    tokens: tuple[int, ...]
    targets: tuple[tuple[int, tuple[int, ...]], ...]


Tell = Callable[[int, int], None]


def encode(request: Request, tokenizer: Tokenizer) -> Encoded:
    """Tokens of both parts, cut where the context alone would end; spaces at its end go to the continuation. An empty
    context is the token that separates documents.  Source: lm-evaluation-harness, `TemplateLM._encode_pair`.

    Raises ConfigError when no token is left to be predicted.
    """
    context = request.context.rstrip()
    rest = request.context[len(context) :] + request.continuation
    if context:
        before = tokenizer.encode(context).tolist()
        after = tokenizer.encode(context + rest).tolist()[len(before) :]
    else:
        after = tokenizer.encode(rest).tolist()
        before = [tokenizer.separator] if tokenizer.separator is not None else after[:1]
        after = after if tokenizer.separator is not None else after[1:]
    if not after:
        raise ConfigError(f"nothing to predict in {request.continuation!r}", where="a task's question")
    return Encoded(tuple(before), tuple(after))


def is_cut(request: Encoded, block_size: int) -> bool:
    """Whether the model reads less of it than there is."""
    return len(request.context) + len(request.continuation) > block_size + 1


def log_likelihoods(
    model: GPT,
    requests: Sequence[Encoded],
    *,
    precision: Precision = "fp32",
    tokens_at_once: int | None = None,
    tell: Tell = lambda done, total: None,
    world: World = ALONE,
) -> list[Answer]:
    """The answer to each request, in their order, the same on every rank; ranks share the batches.

    What is longer than the model's context loses its beginning. The model is in the mode it was in afterwards, and no
    random number is drawn. Raises EnvironmentFault when memory runs out.
    """
    device = next(model.parameters()).device
    budget = tokens_at_once or TOKENS_AT_ONCE.get(device.type, GPU_TOKENS_AT_ONCE)
    batches = list(_batches(_lines(requests, model.config.block_size), budget))
    found = torch.zeros(len(requests), 3, dtype=torch.float64)  # log-likelihood, greedy, tokens
    done = 0
    with memory_guard("tasks", f"{budget:,} tokens in one pass", "a smaller model"), evaluating(model), torch.no_grad():
        for index, batch in enumerate(batches):
            if index % world.size == world.rank:
                for request, answer in _score(model, batch, precision, device):
                    found[request] = torch.tensor(answer, dtype=torch.float64)
            done += sum(len(line.targets) for line in batch)
            tell(done, len(requests))
    joined = world.sum(found.to(device) if world.size > 1 and device.type == "cuda" else found).tolist()
    return [Answer(likelihood, bool(greedy), int(tokens)) for likelihood, greedy, tokens in joined]


def _lines(requests: Sequence[Encoded], block_size: int) -> list[Line]:
    """Longest first, so that memory runs out at once if it does; requests that read the same share a line."""
    sharing: dict[tuple[int, ...], list[tuple[int, tuple[int, ...]]]] = {}
    for index, request in enumerate(requests):
        whole = (request.context + request.continuation)[-(block_size + 1) :]
        targets = whole[-min(len(request.continuation), len(whole) - 1) :]
        sharing.setdefault(whole[:-1], []).append((index, targets))
    ordered = sorted(sharing, key=lambda tokens: (-len(tokens), tokens))
    return [Line(tokens, tuple(sharing[tokens])) for tokens in ordered]


def _batches(lines: Sequence[Line], budget: int) -> Iterator[list[Line]]:
    """Neighbours, as many as fit into `budget` tokens with their padding; at least one."""
    rest = list(lines)
    while rest:
        size = max(1, budget // len(rest[0].tokens))
        yield rest[:size]
        rest = rest[size:]


def _score(
    model: GPT, batch: Sequence[Line], precision: Precision, device: torch.device
) -> list[tuple[int, tuple[float, float, int]]]:
    """(request, (log-likelihood, greedy, tokens)) of every request of a batch."""
    longest = len(batch[0].tokens)
    ids = np.zeros((len(batch), longest), dtype=np.int64)
    rows: list[int] = []
    places: list[int] = []
    wanted: list[int] = []
    counts: list[tuple[int, int]] = []  # request, its targets
    for row, line in enumerate(batch):
        ids[row, : len(line.tokens)] = line.tokens
        for request, targets in line.targets:
            rows += [row] * len(targets)
            places += range(len(line.tokens) - len(targets), len(line.tokens))
            wanted += targets
            counts.append((request, len(targets)))
    with autocast(precision, device):
        hidden = model.hidden(model.step(torch.from_numpy(ids).to(device)))[rows, places]  # (r, C)
        logs, greedy = _targets(model, hidden, torch.tensor(wanted, device=device))
    ends = itertools.accumulate((count for _, count in counts), initial=0)
    parts = [(request, slice(start, start + n), n) for (request, n), start in zip(counts, ends, strict=False)]
    return [(request, (logs[part].sum().item(), float(greedy[part].all()), n)) for request, part, n in parts]


def _targets(model: GPT, hidden: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Log-likelihood of each target, and whether it is the likeliest token.  (r, C), (r,) -> (r,) float64, (r,) bool"""
    logs, greedy = [], []
    for some, targets in zip(hidden.split(TARGETS_AT_ONCE), wanted.split(TARGETS_AT_ONCE), strict=True):
        scores = model.lm_head(some, model.wte).float()  # (r, V)
        logs.append(scores.log_softmax(-1).gather(-1, targets[:, None])[:, 0].cpu().double())
        greedy.append((scores.argmax(-1) == targets).cpu())
    return torch.cat(logs), torch.cat(greedy)
