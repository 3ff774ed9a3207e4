"""The checks of components of the model, optimizers and schedules, and that two ranks with half a batch each compute
the gradient of one process with the whole batch.

A check is a function of one `Case` that raises AssertionError with a message; it does not depend on the component's
name.
"""

from __future__ import annotations

import copy
import datetime
import logging
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from gpt2lab.components.context import Cache
from gpt2lab.inspection.costs import costs
from gpt2lab.model import GPT, ModelConfig, build_model
from gpt2lab.registry import PLUGINS, SLOTS, load_plugin
from gpt2lab.testing.cases import CONTEXT, LARGE_ENOUGH, VOCABULARY, Case, batch, distance, disturbed, modes, seeded


def check_documented(case: Case) -> None:
    """The component has a summary, documented options, and a source."""
    component = SLOTS[case.slot][case.name]
    assert component.source, "names no source"
    assert len(component.summary) > 20, "the docstring's first line does not say what it does"
    undocumented = [o for o in component.parameters if f"{o}:" not in component.doc]
    assert not undocumented, f"the docstring does not explain {', '.join(undocumented)} (write 'option: meaning')"


# --- components of the model ---


def check_builds(case: Case) -> None:
    """A tiny model with it can be built. If not, the other checks are left out."""
    case.model()


def check_shape(case: Case) -> None:
    """(B, T) -> (B, T, V), finite, with 4, 12 and 25 heads (powers of two, even, odd)."""
    tokens, _ = batch()
    for n_head in (4, 12, 25):
        logits = case.model(n_head=n_head)(tokens)
        assert logits.shape == (*tokens.shape, VOCABULARY), f"{n_head} heads: shape {tuple(logits.shape)}"
        assert logits.isfinite().all(), f"{n_head} heads: not finite"


def check_no_look_ahead(case: Case) -> None:
    """Changing the tokens from any place on does not change earlier logits, in evaluation and while training."""
    tokens = batch(rows=1)[0].expand(CONTEXT, -1)
    later = torch.ones(CONTEXT, CONTEXT, dtype=torch.bool).triu()  # row t: the tokens from t on
    changed = torch.where(later, (tokens + 1) % VOCABULARY, tokens)
    for when, model in modes(disturbed(case.model(n_layer=3))):
        gaps = (seeded(model, tokens) - seeded(model, changed)).abs().amax(-1).masked_fill(later, 0.0)
        place, token = divmod(int(gaps.argmax()), CONTEXT)
        assert gaps.max() < 1e-5, (
            f"the component looks ahead{when}: logits of token {token} moved by {gaps.max():.1e} when the tokens from "
            f"{place} on changed"
        )


def check_loss_at_init(case: Case) -> None:
    """The first loss is near ln V."""
    tokens, targets = batch(rows=LARGE_ENOUGH)
    loss, uniform = case.model().loss(tokens, targets).item(), math.log(VOCABULARY)
    assert uniform - 0.05 <= loss <= uniform + 1, f"loss at initialisation {loss:.3f}, expected near {uniform:.3f}"


def check_gradients(case: Case) -> None:
    """The objective's gradient reaches every parameter while training."""
    model, (tokens, targets) = disturbed(case.model(n_layer=3)).train(), batch(rows=LARGE_ENOUGH)
    model.objective(tokens, targets)[0].backward()
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    unreached = [n for n, p in trained if p.grad is None or not p.grad.abs().max() > 0]
    assert not unreached, f"no gradient reaches {', '.join(unreached)}"


def check_seed(case: Case) -> None:
    """Equal seeds give equal weights, different seeds different ones; global random state is neither used nor
    changed."""
    before = torch.get_rng_state()
    first = case.model(seed=3).state_dict()
    assert torch.equal(before, torch.get_rng_state()), "building draws from the global random generator"
    torch.rand(1)
    second, other = case.model(seed=3).state_dict(), case.model(seed=4).state_dict()
    assert all(torch.equal(first[k], second[k]) for k in first), "equal seeds give different weights"
    assert any(not torch.equal(first[k], other[k]) for k in first), "different seeds give equal weights"


def check_resume_of_model(case: Case) -> None:
    """The state dict holds everything that training and evaluation depend on: after a step, a model loaded from it
    gives the same logits and continues with the same weights."""
    model, fresh = disturbed(case.model()).train(), case.model(seed=9).train()
    train_step(model, seed=0)
    fresh.load_state_dict(model.state_dict())
    tokens, _ = batch()
    gap = distance(seeded(model.eval(), tokens), seeded(fresh.eval(), tokens))
    different = ", ".join(unsaved(model, fresh))
    cause = (
        f"{different} changed while training and is not in the state dict: use register_buffer"
        if different
        else "its state dict misses something, or its random numbers are not from torch's global generator"
    )
    assert gap == 0.0, f"a model loaded after a step of training computes something else: {cause}"
    for one in (model, fresh):
        train_step(one.train(), seed=1)
    pairs = zip(model.state_dict().items(), fresh.state_dict().values(), strict=True)
    moved = [name for (name, a), b in pairs if not torch.equal(a, b)]
    assert not moved, f"a training that was resumed gives another {moved[0]}: {cause}"


def train_step(model: GPT, seed: int) -> None:
    """One step of gradient descent on a batch, with seeded random numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.zero_grad()
        model.objective(*batch(seed))[0].backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=0.1)


def unsaved(one: GPT, other: GPT) -> Iterator[str]:
    """Attributes with plain values that differ between two models."""
    for (name, a), b in zip(one.named_modules(), other.modules(), strict=True):
        for key, value in vars(a).items():
            if isinstance(value, (bool, int, float, str)) and value != vars(b).get(key):
                yield f"{name}.{key}"


def check_cached_equals_full(case: Case) -> None:
    """Processing a text in pieces with a cache gives the same logits as in one pass: token by token, several tokens at
    a time, and both; beyond the training context where positions are unlimited."""
    model, (tokens, _) = disturbed(case.model(n_layer=3)), batch()
    if model.max_context is None:
        tokens = torch.cat([tokens, batch(seed=2)[0]], 1)
    with torch.no_grad():
        full = model(tokens)
        for sizes in ([5, 3], [], [1, 9, 6]):  # the rest of the text token by token
            cache, singles = Cache(), [1] * (tokens.shape[1] - sum(sizes))
            pieces = [model(piece, cache=cache) for piece in tokens.split([*sizes, *singles], 1)]
            gap = distance(torch.cat(pieces, 1), full)
            assert gap < 2e-5, f"cached and full forward differ by {gap:.1e}"


def check_documents(case: Case) -> None:
    """Given documents, tokens see nothing of others, in evaluation and while training: the outputs of a document do not
    depend on the one before it."""
    if case.slot not in ("attention", "mask", "scores", "embedding"):
        return
    tokens, _ = batch()
    documents = (torch.arange(CONTEXT, device=tokens.device) >= 6).long().expand(2, -1)
    changed = tokens.clone()
    changed[:, :6] = (changed[:, :6] + 1) % VOCABULARY
    for when, model in modes(disturbed(case.model(position="none"))):
        gap = distance(*(seeded(model, x, documents=documents)[:, 6:] for x in (tokens, changed)))
        assert gap < 1e-5, (
            f"it crosses documents{when}: the logits of one moved by {gap:.1e} when the one before it changed "
            "(see ctx.documents; Mask.allowed respects it)"
        )


PROMISES: dict[str, dict[str, Any]] = {
    "bias": {"position": "alibi"}, "rotate": {"position": "rotary"}, "value": {"stack": ["value_residual"]},
}  # fmt: skip
"""Capabilities of an attention, each with a choice that it must let through."""


def check_promises(case: Case) -> None:
    """(attention) What its capabilities promise to other components changes the logits."""
    words = SLOTS[case.slot][case.name].can & PROMISES.keys() if case.slot == "attention" else ()
    plain = disturbed(case.model(position="none"))
    if plain.h[0].attn is None:  # switched off
        return
    for word in words:
        changed = disturbed(case.model(**{"position": "none", **PROMISES[word]}))
        with torch.no_grad():
            for name, tensor in plain.named_parameters():
                changed.get_parameter(name).copy_(tensor)
        what = ", ".join(f"{slot}={choice}" for slot, choice in PROMISES[word].items())
        assert distance(plain(batch()[0]), changed(batch()[0])) > 0, f"offers '{word}', but {what} changes nothing"


def check_costs(case: Case) -> None:
    """Forward and backward run on the meta device, where tensors have shapes but no numbers: parameters and FLOPs of
    every model are counted there."""
    costs(case.config())


def check_bf16(case: Case) -> None:
    """Forward and backward of training run under bfloat16 autocast, with finite gradients and a loss near float32's."""
    tokens, targets = batch(rows=LARGE_ENOUGH)
    model = disturbed(case.model()).train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        exact = copy.deepcopy(model).loss(tokens, targets).item()
        torch.manual_seed(0)
        with torch.autocast(tokens.device.type, dtype=torch.bfloat16):
            loss, parts = model.objective(tokens, targets)
    loss.backward()
    assert parts["loss"].dtype == torch.float32, "the loss is not float32 under autocast"
    assert abs(parts["loss"].item() - exact) < 0.05, f"loss {parts['loss'].item():.3f}, in float32 {exact:.3f}"
    wild = [n for n, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    assert not wild, f"gradients are not finite: {', '.join(wild)}"


def check_compile(case: Case) -> None:
    """torch.compile traces forward and backward of training (aot_eager) to the same loss and gradients."""
    choice, test = case.choice(), SLOTS[case.slot][case.name].check
    connects_layers = bool(test and test(case.config(n_layer=1), choice.options))
    compiled_as_eager(case.config(n_layer=2 if connects_layers else 1))


def compiled_as_eager(config: ModelConfig) -> None:
    """Raise AssertionError if a compiled model has other losses or gradients."""
    tokens, targets = batch(rows=LARGE_ENOUGH)
    model = disturbed(build_model(config)).train()
    twin = copy.deepcopy(model)
    torch._dynamo.reset()
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)  # a graph break costs time, but is no mistake
    compiled = torch.compile(lambda x, y: twin.objective(x, y)[0], backend="aot_eager")
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        # dynamo looks at .grad of inner tensors after a graph break and hides the warning by patching how it is shown,
        # which does not help where warnings are errors
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning)
        torch.manual_seed(0)
        eager = model.objective(tokens, targets)[0]
        torch.manual_seed(0)
        compiled_loss = compiled(tokens, targets)
    eager.backward()
    compiled_loss.backward()
    assert abs(eager.item() - compiled_loss.item()) < 1e-5, (
        f"compiled loss {compiled_loss.item()}, eager {eager.item()}"
    )
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        if a.grad is None or b.grad is None:
            assert a.grad is b.grad, f"{name} has a gradient only {'if' if a.grad is None else 'if not'} compiled"
        else:
            assert distance(a.grad, b.grad) < 1e-4, f"compiled gradient of {name} differs"


def check_overfits(case: Case) -> None:
    """Two hundred AdamW steps on one batch bring its loss close to zero. (slow)"""
    tokens, targets = batch()
    model = case.model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(200):
        optimizer.zero_grad()
        model.objective(tokens, targets)[0].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    loss = model.loss(tokens, targets).item()
    assert loss < 0.7, f"after 200 steps on one batch its loss is still {loss:.2f}"


# --- two ranks ---


def ranks_problem(gap: float) -> str | None:
    """The message for a gap between two ranks and one; None if small."""
    return None if gap < 1e-5 else f"gradients of two ranks and of one differ by {gap:.1e}"


def two_ranks_against_one(todo: list[Case]) -> list[float]:
    """For each case, how far the averaged gradient of two gloo ranks with half a batch each is from that of one process
    with the whole batch. One spawned pair of processes serves all cases."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_rank, args=(folder, todo, tuple(PLUGINS)), nprocs=2, join=True)
        gaps: list[float] = torch.load(f"{folder}/gaps.pt", weights_only=True)
    return gaps


def _rank(rank: int, folder: str, todo: list[Case], plugins: tuple[str, ...]) -> None:
    for plugin in plugins:
        load_plugin(plugin)

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60)
    )
    half = [_gradient(case, slice(rank * 4, rank * 4 + 4)) for case in todo]
    for gradient in half:
        dist.all_reduce(gradient)
        gradient /= 2
    dist.destroy_process_group()
    if rank == 0:
        gaps = [distance(g, _gradient(case, slice(0, 8))) for g, case in zip(half, todo, strict=True)]
        torch.save(gaps, f"{folder}/gaps.pt")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads may abort a process during a regular exit


def draws(model: GPT) -> bool:
    """Whether training uses random numbers, which differ between ranks."""
    tokens, targets = batch(rows=1)
    before = torch.get_rng_state()
    copy.deepcopy(model).train().objective(tokens, targets)
    return not torch.equal(before, torch.get_rng_state())


def _gradient(case: Case, rows: slice) -> Tensor:
    model = disturbed(case.model())
    tokens, targets = (x[rows] for x in batch(rows=8))
    model.train(not draws(model))
    model.objective(tokens, targets)[0].backward()
    flat = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return torch.cat([g.flatten() for g in flat])
