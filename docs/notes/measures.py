"""The numbers behind the figures of the notes, from the package's own code and fresh models; each takes seconds.

Everything is seeded. Sizes are parameters, so that tests can ask small models the same questions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from coordinates import at_widths, coordinate_check
from torch import Tensor

import gpt2lab.optim  # noqa: F401  (fills the slot of schedules)
from gpt2lab.components.attend import score_map
from gpt2lab.components.base import Builder
from gpt2lab.components.context import ForwardContext
from gpt2lab.components.position import Alibi, Rotary, Sinusoidal
from gpt2lab.config import load_config
from gpt2lab.model import GPT, ModelConfig, build_model
from gpt2lab.registry import SLOTS
from gpt2lab.training.diagnostics import ActivationRms, Diagnostic

GPT2_VARIANCE = 768 * 0.02**2
"""What a matrix of GPT-2 124M makes of inputs of variance 1 at init. Narrow models are drawn with a larger sd, so that
it is the same for them."""


def generator(seed: int = 0) -> torch.Generator:
    """Random numbers that are the same on every machine."""
    return torch.Generator().manual_seed(seed)


def small(n_layer: int, n_embd: int, **parts: Any) -> ModelConfig:
    """A narrow GPT-2 over bytes whose matrices act like those of 124M at init.  init: by name.  variance: what a matrix
    makes of inputs of variance 1."""
    init = parts.pop("init", "gpt2")
    std = math.sqrt(parts.pop("variance", GPT2_VARIANCE) / n_embd)
    scaled = {"name": init, "std": std} | ({"position_std": std} if init == "gpt2_tf" else {})
    sizes = {"n_layer": n_layer, "n_head": n_embd // 32, "n_embd": n_embd, "block_size": 128, "vocab_size": 256}
    return ModelConfig(**{**sizes, "init": scaled, **parts})


def tokens_for(model: GPT, rows: int = 4, length: int | None = None) -> tuple[Tensor, Tensor]:
    """Random tokens and targets.  -> (rows, T), (rows, T)"""
    T = length or model.config.block_size
    drawn = torch.randint(0, model.config.vocab_size, (rows, T + 1), generator=generator(1))
    return drawn[:, :-1], drawn[:, 1:]


# attention ------------------------------------------------------------------------------------------------------------


def score_sizes(widths: Sequence[int], keys: int = 256) -> dict[str, list[float]]:
    """For queries and keys of variance 1 and each width D: sd of the scores, and how many keys the softmax effectively
    looks at (exp of its entropy), with and without the 1/sqrt(D)."""
    found: dict[str, list[float]] = {"sd": [], "sd unscaled": [], "keys": [], "keys unscaled": []}
    for D in widths:
        q, k = (torch.randn(1, 1, keys, D, generator=generator(i)) for i in (0, 1))
        config = ModelConfig(n_head=1, n_embd=D)
        plain = Builder(config, config.choices()).build("scores")
        for suffix, scale in (("", D**-0.5), (" unscaled", 1.0)):
            scores = score_map(q, k, torch.zeros(()), plain, scale)  # (1, 1, T, S)
            odds = scores.softmax(-1)
            entropy = -(odds * odds.clamp(min=1e-30).log()).sum(-1)
            found[f"sd{suffix}"].append(scores.std().item())
            found[f"keys{suffix}"].append(entropy.exp().mean().item())
    return found


# positions ------------------------------------------------------------------------------------------------------------


def rotary_scores(length: int, width: int = 64, theta: float = 10000.0) -> Tensor:
    """Score of a unit query with the same unit vector as key, by distance: what rotation alone does.  -> (length,)"""
    rotary, ctx = Rotary(theta, 1.0), ForwardContext(torch.zeros(1, length, dtype=torch.int64))
    same = torch.full((1, 1, length, width), width**-0.5)
    turned = rotary.rotate(same, ctx, "q")[0, 0]
    return turned @ turned[0]


def rotary_shift_error(shift: int, width: int = 64) -> float:
    """Largest change of any score when all positions move by `shift`: zero but for rounding."""
    rotary, T = Rotary(10000.0, 1.0), 64
    q, k = (torch.randn(1, 1, T, width, generator=generator(i)) for i in (0, 1))
    far = ForwardContext(torch.zeros(1, T, dtype=torch.int64))
    far.q_positions = far.q_positions + shift
    here = ForwardContext(torch.zeros(1, T, dtype=torch.int64))
    scores = [rotary.rotate(q, s, "q") @ rotary.rotate(k, s, "k").mT for s in (here, far)]
    return (scores[0] - scores[1]).abs().max().item()


def sinusoidal_products(length: int, n_embd: int = 64) -> Tensor:
    """Product of the wave vector of position 0 with that of each distance, made 1 at distance 0.  -> (length,)"""
    ctx = ForwardContext(torch.zeros(1, length, dtype=torch.int64))
    waves = Sinusoidal(n_embd, 10000.0, 1.0).add(torch.zeros(1, length, n_embd), ctx)[0]
    return waves @ waves[0] / (n_embd / 2)


def alibi_factors(length: int, n_head: int = 8) -> Tensor:
    """What ALiBi multiplies a weight with before the softmax is normalised, by head and distance.  -> (H, length)"""
    positions = torch.arange(length)
    return Alibi(n_head).bias(positions[-1:], positions)[:, 0].flip(-1).exp()


# depth ----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def stream_rms(config: ModelConfig, seed: int = 0) -> list[float]:
    """rms of the residual stream: of the embedding, then behind each block, in a fresh model."""
    model = build_model(config, seed=seed).eval()
    tokens, _ = tokens_for(model)
    ctx = model.context(tokens)
    ctx.observer = stream = ActivationRms()
    first: list[float] = []
    handle = model.h[0].register_forward_pre_hook(lambda _, args: first.append(args[0].square().mean().sqrt().item()))
    model.hidden(ctx)
    handle.remove()
    return [first[0], *(float(stream.values[depth]) for depth in range(config.n_layer))]


def mlp_variance() -> float:
    """Variance that one unscaled MLP of GPT-2 writes at init: 4 v E[gelu(u)^2] with u ~ N(0, v), v = C 0.02^2."""
    v = GPT2_VARIANCE
    u = torch.linspace(-8, 8, 20001, dtype=torch.float64)
    density = torch.exp(-u.square() / 2) / math.sqrt(2 * math.pi)
    gelu = torch.nn.functional.gelu(u * math.sqrt(v), approximate="tanh")
    return 4 * v * torch.trapezoid(gelu.square() * density, u).item()


def gradients(config: ModelConfig, seed: int = 0) -> dict[str, list[float]]:
    """2-norms in a fresh model, block by block: of the loss's gradient by the stream behind a block (`stream`), and by
    the weights of the block's MLP (`mlp`)."""
    model = build_model(config, seed=seed).train()
    tokens, targets = tokens_for(model)
    kept: list[Tensor] = []

    def keep(_: Any, __: Any, out: Tensor) -> None:
        out.retain_grad()
        kept.append(out)

    handles = [block.register_forward_hook(keep) for block in model.h]
    model.objective(tokens, targets)[0].backward()
    for handle in handles:
        handle.remove()
    stream = [norm_of([x.grad]) for x in kept]
    return {"stream": stream, "mlp": [norm_of([p.grad for p in block.mlp.parameters()]) for block in model.h]}


def norm_of(parts: Sequence[Tensor | None]) -> float:
    """2-norm of several tensors together."""
    return math.sqrt(sum(x.double().square().sum().item() for x in parts if x is not None))


# width ----------------------------------------------------------------------------------------------------------------


def chain(length: int, vocab_size: int = 256) -> Any:
    """Tokens each of which has four that may follow it: something to learn.  -> (length,) int64"""
    followers = torch.randint(0, vocab_size, (vocab_size, 4), generator=generator(4)).tolist()
    token, found = 0, []
    for pick in torch.randint(0, 4, (length,), generator=generator(5)).tolist():
        token = followers[token][pick]
        found.append(token)
    return torch.tensor(found).numpy()


def moved_by_width(parametrization: str, widths: Sequence[int], steps: int = 8, lr: float = 1e-3) -> dict[str, Any]:
    """How far two blocks, their scores and the logits move in AdamW's first steps; muP's base is the first width."""
    choice = f"{{name: mup, base_width: {widths[0]}}}" if parametrization == "mup" else parametrization
    sizes = ["model.n_layer=2", "model.n_head=2", f"model.n_embd={widths[0]}", "model.block_size=64"]
    config = load_config("nano", [*sizes, f"model.parametrization={choice}", f"optim.lr={lr}"])
    return coordinate_check(at_widths(config, widths), steps=steps, tokens=chain(8192))


# the first loss -------------------------------------------------------------------------------------------------------


def tied_first_loss(n_embd: int, std: float = 0.02, vocab_size: int = 50257) -> float:
    """ln V + C std^2 / 2: the first loss of a tied head, for targets that the input does not tell."""
    return math.log(vocab_size) + n_embd * std**2 / 2


@torch.no_grad()
def first_losses(widths: Sequence[int], n_layer: int = 2, vocab_size: int = 50257, rows: int = 4) -> list[float]:
    """Measured first losses of fresh models of these widths on random tokens, in the mean over all targets that each
    could have."""
    found = []
    for C in widths:
        config = ModelConfig(n_layer=n_layer, n_head=C // 64, n_embd=C, block_size=64, vocab_size=vocab_size)
        model = build_model(config).eval()
        logits = model(tokens_for(model, rows)[0])
        found.append((logits.logsumexp(-1) - logits.mean(-1)).mean().item())
    return found


@torch.no_grad()
def first_logits(config: ModelConfig, rows: int = 2) -> dict[str, Tensor]:
    """Scores of a fresh model: of the very token that was read (`own`), and of all others (`others`)."""
    model = build_model(config).eval()
    tokens, _ = tokens_for(model, rows, 64)
    logits = model(tokens)
    own = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, tokens[..., None], True)
    return {"own": logits[own], "others": logits[~own]}


# schedule -------------------------------------------------------------------------------------------------------------


def rates(name: str, steps: int, warmup_steps: int) -> list[float]:
    """The multiplier of every step of a schedule with its defaults."""
    slot = SLOTS["schedule"]
    multiplier = slot.build(slot.read(name), steps, warmup_steps)
    return [multiplier(step) for step in range(steps)]


def adam_update_sizes(steps: int, n_embd: int = 64) -> list[float]:
    """rms of AdamW's move divided by the rate, step by step, at a rate so small that the weights hardly change: how
    far it moves on the gradients' noise alone. A batch is new in every step."""
    model = build_model(small(2, n_embd)).train()
    lr = 1e-6
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    weights = [p for name, p in model.named_parameters() if "mlp" in name and p.ndim == 2]
    draws, sizes = generator(2), []
    for _ in range(steps):
        drawn = torch.randint(0, 256, (4, 65), generator=draws)
        model.objective(drawn[:, :-1], drawn[:, 1:])[0].backward()
        before = [p.detach().double().clone() for p in weights]
        optimizer.step()
        optimizer.zero_grad()
        moved = [(p.detach().double() - b) for p, b in zip(weights, before, strict=True)]
        sizes.append(norm_of(moved) / math.sqrt(sum(p.numel() for p in weights)) / lr)
    return sizes


# precision ------------------------------------------------------------------------------------------------------------


def running_sums(terms: int, dtype: torch.dtype) -> list[float]:
    """1 + 1 + ... with every partial sum kept in `dtype`, divided by the true sum, for each number of terms."""
    total, one, found = torch.zeros((), dtype=dtype), torch.ones((), dtype=dtype), []
    for n in range(1, terms + 1):
        total = total + one
        found.append(total.item() / n)
    return found


def flushed_to_zero(scales: Sequence[float], n_embd: int = 128, tokens: int = 1024) -> list[float]:
    """Share of the gradients of a fresh model's activations behind its MLPs (for the mean loss over `tokens`) that
    float16 cannot tell from zero, for each factor on the loss. Exact zeros do not count."""
    model = build_model(small(4, n_embd)).train()
    inputs, targets = tokens_for(model, tokens // 128, 128)
    kept: list[Tensor] = []

    def keep(_: Any, __: Any, out: Tensor) -> None:
        out.retain_grad()
        kept.append(out)

    for block in model.h:
        block.mlp.c_fc.register_forward_hook(keep)
    model.objective(inputs, targets)[0].backward()
    found = torch.cat([x.grad.flatten() for x in kept if x.grad is not None])
    found = found[found != 0]
    return [((found * scale).half() == 0).double().mean().item() for scale in scales]


def uneven_parts(counts: Sequence[int] = (128, 16)) -> dict[str, float]:
    """Gradients of a batch whose rows have `counts` targets, taken at once and row by row: relative distance of the
    mean of the rows' means from it, and of their means weighted by targets."""
    model = build_model(small(2, 64)).train()
    inputs, targets = tokens_for(model, len(counts))
    targets = torch.stack([row.where(torch.arange(len(row)) < n, -100) for row, n in zip(targets, counts, strict=True)])

    def gradient(parts: Sequence[tuple[slice, float]]) -> Tensor:
        model.zero_grad()
        for rows, weight in parts:
            (model.objective(inputs[rows], targets[rows])[0] * weight).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    rows = [slice(i, i + 1) for i in range(len(counts))]
    whole = gradient([(slice(None), 1.0)])
    plain = gradient([(row, 1 / len(counts)) for row in rows])
    weighed = gradient([(row, n / sum(counts)) for row, n in zip(rows, counts, strict=True)])
    return {
        name: ((found - whole).norm() / whole.norm()).item() for name, found in (("means", plain), ("sums", weighed))
    }


@torch.no_grad()
def first_scores(config: ModelConfig) -> float:
    """sd of the attention scores of a fresh model's first block, among pairs that may see each other."""
    model = build_model(config).eval()
    ctx = model.context(tokens_for(model)[0])
    kept: list[Tensor] = []

    class Look(Diagnostic):
        def attention(self, depth: int, q: Tensor, k: Tensor, bias: Tensor, scores: Any, scale: float) -> None:
            if depth == 0:
                kept.append(score_map(q, k, bias, scores, scale))

    ctx.observer = Look()
    model.hidden(ctx)
    return kept[0][kept[0].isfinite()].std().item()


def noise_update_size(step: int, beta1: float = 0.9) -> float:
    """rms of Adam's update over its rate after `step` steps of gradients that are pure noise, if v knew their variance:
    sqrt((1 - b)/(1 + b) (1 + b^n)/(1 - b^n)), which is 1 at n = 1."""
    power = beta1**step
    return math.sqrt((1 - beta1) / (1 + beta1) * (1 + power) / (1 - power))


def settled_excess(rate: float, steps: int = 200_000, noise: float = 1.0) -> float:
    """Mean of w^2 / 2 under gradient descent on it with noise of this sd on every gradient, after it has settled."""
    kicks = torch.randn(steps, generator=generator(3), dtype=torch.float64).mul(rate * noise).tolist()
    w, total = 0.0, 0.0
    for n, kick in enumerate(kicks):
        w = (1 - rate) * w - kick
        total += w * w / 2 if n >= steps // 10 else 0.0
    return total / (steps - steps // 10)


def mlp_gains() -> tuple[float, float]:
    """Of one unscaled MLP of GPT-2 at init that reads variance 1: the variance that it writes (s^2), and by how much it
    multiplies the mean square of a gradient on its way back (j^2 = 4 v^2 E[gelu'(u)^2])."""
    v = GPT2_VARIANCE
    u = torch.linspace(-8, 8, 20001, dtype=torch.float64).requires_grad_()
    gelu = torch.nn.functional.gelu(u * math.sqrt(v), approximate="tanh")
    (by_u,) = torch.autograd.grad(gelu.sum(), u)
    density = torch.exp(-u.detach().square() / 2) / math.sqrt(2 * math.pi)
    slope = by_u / math.sqrt(v)
    return mlp_variance(), 4 * v**2 * torch.trapezoid(slope.square() * density, u.detach()).item()
