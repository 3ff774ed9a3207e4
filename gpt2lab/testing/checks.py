"""The checks of components of the model, optimizers and schedules, and that two ranks with half a batch each compute
the gradient of one process with the whole batch.

A check is a function of one `Case` that raises AssertionError with a message; it does not depend on the component's
name.
"""

from __future__ import annotations

import copy
import datetime
import json
import logging
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from torch.optim import Optimizer

from gpt2lab.data.curricula import TrainingBatches, TrainingText, build_batches
from gpt2lab.inspection.costs import costs
from gpt2lab.model import GPT, MODEL_SLOTS, ModelConfig, build_model
from gpt2lab.optim.groups import OptimConfig, build_averaging, build_optimizers
from gpt2lab.registry import PLUGINS, SLOTS, load_plugin
from gpt2lab.testing.cases import (
    CONTEXT,
    LARGE_ENOUGH,
    VOCABULARY,
    Case,
    batch,
    compared,
    distance,
    disturbed,
    in_pieces,
    modes,
    seeded,
)
from gpt2lab.training.checkpoints import join_tree, split_tree
from gpt2lab.training.state import TrainState, step_of


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
        before, after = compared(model, tokens, changed)
        gaps = (before - after).abs().amax(-1).masked_fill(later, 0.0)
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
    for subject in (model, fresh):
        train_step(subject.train(), seed=1)
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
    for sizes in ([5, 3], [], [1, 9, 6]):
        gap = distance(in_pieces(model, tokens, sizes), full)
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
        before, after = compared(model, tokens, changed, documents=documents)
        gap = distance(before[:, 6:], after[:, 6:])
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
    with the whole batch. One spawned pair of processes serves all cases: forks of a process with threads could hang."""
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


TOKENS, BLOCK, SEQUENCES, STEPS, SEPARATOR = 6000, 16, 8, 40, 0


def training_text(seed: int = 1) -> TrainingText:
    """Text of two corpora, with documents of about 20 tokens."""
    tokens = np.random.default_rng(0).integers(1, 50, TOKENS)
    tokens[np.random.default_rng(1).random(TOKENS) < 1 / 20] = SEPARATOR
    corpora = {"first": range(2000), "second": range(2000, TOKENS)}
    return TrainingText(tokens, BLOCK, SEQUENCES, STEPS, seed, SEPARATOR, corpora)


def check_batches(case: Case) -> None:
    """Neighbouring tokens of the text, a pure function of seed and step, shared by two ranks, as many in all as without
    the part."""

    def built() -> TrainingBatches:
        made = build_batches((case.choice(),), training_text())
        assert isinstance(made, TrainingBatches), "no TrainingBatches"
        return made

    made, text = built(), training_text()
    seen = [made.at(step) for step in range(STEPS)]
    total = sum(inputs.size for inputs, _ in seen)
    assert total == STEPS * SEQUENCES * BLOCK, f"{total} tokens in the training, not {STEPS * SEQUENCES * BLOCK}"
    for inputs, targets in seen:
        assert inputs.shape == targets.shape, f"inputs {inputs.shape}, targets {targets.shape}"
        assert BLOCK % inputs.shape[1] == 0, f"rows of {inputs.shape[1]} tokens do not divide blocks of {BLOCK}"
        assert (inputs[:, 1:] == targets[:, :-1]).all(), "targets are not the next tokens"
    for step in (STEPS - 1, 0, 7):
        again = built().at(step)
        assert (again[0] == seen[step][0]).all(), f"step {step} depends on the steps before it"
        first, end = made.sequences_before(step), made.sequences_before(step + 1)
        starts = [made.start(index) for index in range(first, end)]
        rows = np.stack([text.tokens[start : start + BLOCK] for start in starts])
        assert (rows.reshape(seen[step][0].shape) == seen[step][0]).all(), "not the text at its starts"
        if (end - first) % 2 == 0:
            halves = [made.at(step, rank=rank, world=2)[0] for rank in (0, 1)]
            assert (np.concatenate(halves) == seen[step][0]).all(), "two ranks do not share the batch of one"


RATES = (3e-3, 0.1)
"""Rates to try: not every optimizer takes steps of Adam's size."""


def training(case: Case, lr: float = RATES[0]) -> TrainState:
    """A tiny GPT-2 in training with this optimizer or average."""
    model = Case("norm", "layernorm").model().train()
    config = OptimConfig.model_validate({"lr": lr, case.slot: case.choice()})
    optimizers = half_way(build_optimizers(config, model.params()))
    return TrainState(model, optimizers, averaging=build_averaging(config, model.params(), steps=8))


def half_way(optimizers: list[Optimizer]) -> list[Optimizer]:
    """The same, in the middle of a training: the loop sets the progress of every group."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["progress"] = 0.5
    return optimizers


def advance(state: TrainState, steps: int, generator_seed: int = 0) -> float:
    """Train on one batch; -> its loss afterwards."""
    model: Any = state.model
    tokens, targets = batch()
    for _ in range(steps):
        gradients(model)
        torch.manual_seed(generator_seed)
        for optimizer in state.optimizers:
            step_of(optimizer, lambda: gradients(model))
        state.step += 1
        if state.averaging is not None:
            state.averaging.update(state.step)
    loss: Tensor = model.loss(tokens, targets)
    return loss.item()


def gradients(model: Any, seed: int = 1, factor: float = 1.0) -> Tensor:
    """Replace the gradients by those of a batch's loss times a factor, and return it."""
    model.zero_grad()
    loss: Tensor = factor * model.loss(*batch(seed))
    loss.backward()
    return loss


def gap(one: TrainState, other: TrainState, part: str = "model") -> float:
    """The largest difference between weights, of those that are evaluated, or those in training (`trained`)."""
    first, second = (state.state_dict() for state in (one, other))
    before, after = first.get(part, first["model"]), second.get(part, second["model"])
    return max(distance(before[name], after[name]) for name in before)


def check_optimizer(case: Case) -> None:
    """Takes every parameter exactly once, and lowers the loss."""
    state = training(case)
    taken = [id(p) for o in state.optimizers for group in o.param_groups for p in group["params"]]
    assert sorted(taken) == sorted(id(p) for p in state.model.parameters()), "not every parameter is taken exactly once"
    first, reached = advance(state, 0), [advance(training(case, lr), 10) for lr in RATES]
    losses = " and ".join(f"{loss:.3f} at rate {lr}" for loss, lr in zip(reached, RATES, strict=True))
    assert min(reached) < first - 0.1, f"loss went from {first:.3f} to {losses} in ten steps on one batch"


def check_resume(case: Case) -> None:
    """Continues exactly from what a checkpoint holds, without pickle, and whether or not it was evaluated."""
    whole, resumed = training(case), training(case)
    advance(whole, 4)
    with whole.evaluated():
        pass
    plain, tensors = split_tree(whole.state_dict())
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    resumed.load_state_dict(join_tree(json.loads(json.dumps(plain)), copies))
    reference = training(case)
    advance(reference, 8)
    advance(whole, 4)
    advance(resumed, 4)
    assert gap(reference, whole, "trained") == 0.0, "an evaluation in between changes the training"
    for part in ("trained", "model"):
        assert gap(whole, resumed, part) == 0.0, (
            "a restored optimizer continues differently: its state misses something"
        )


def check_same_on_all_ranks(case: Case) -> None:
    """Equal gradients give equal weights, whatever the state of the global generator, which differs between ranks."""
    one, other = training(case), training(case)
    advance(one, 3, generator_seed=1)
    before = torch.get_rng_state()
    advance(other, 3, generator_seed=2)
    apart = gap(one, other, "trained")
    assert apart == 0.0, f"draws from the global generator, so ranks drift apart (by {apart:.1e} in three steps)"
    torch.set_rng_state(before)


def check_average(case: Case) -> None:
    """An average leaves the training alone, and lies between the weights that it averages."""
    plain, averaged = training(Case("averaging", "none")), training(case)
    low, high = (dict[str, Tensor]() for _ in range(2))
    for _ in range(8):
        advance(plain, 1)
        advance(averaged, 1)
        for name, tensor in plain.model.named_parameters():
            low[name] = torch.minimum(low.get(name, tensor), tensor).detach().clone()
            high[name] = torch.maximum(high.get(name, tensor), tensor).detach().clone()
    assert gap(plain, averaged, "trained") == 0.0, "the training is another one with the average"
    with averaged.evaluated():
        for name, tensor in averaged.model.named_parameters():
            outside = torch.maximum(low[name] - tensor, tensor - high[name]).max().item()
            assert outside < 1e-6, f"{name} is {outside:.1e} outside of the values that it had"


def check_gradients_untouched(case: Case) -> None:
    """After a step, backward leaves the gradient of its batch and nothing else."""
    state = training(case)
    model: Any = state.model
    parameters = list(model.parameters())
    for seed in range(3):
        wanted = torch.autograd.grad(model.loss(*batch(seed)), parameters)
        gradients(model, seed)
        off = max(distance(p.grad, g) for p, g in zip(parameters, wanted, strict=True) if p.grad is not None)
        assert off < 1e-6, f"after {seed} steps the gradient of a batch is off by {off:.1e}: something was added to it"
        for optimizer in state.optimizers:
            step_of(optimizer, lambda seed=seed: gradients(model, seed))  # type: ignore[misc]


def check_rates(case: Case) -> None:
    """Where it offers `rates`: a parameter with a factor on its rate moves by that factor as far as without, and how
    far does not follow the size of gradients."""
    if "rates" not in SLOTS["optimizer"][case.name].can:
        return

    component, lr = SLOTS["optimizer"][case.name], 1e-3
    # decay does not follow the factor, and would hide small first steps
    plain_steps = {"weight_decay": 0.0} if "weight_decay" in component.parameters else {}
    choice = {"name": case.name, **case.options, **plain_steps}

    def moves(factor: float, loss_factor: float) -> dict[tuple[str, str], float]:
        model = disturbed(Case("norm", "layernorm").model().train())
        params = [replace(p, rate=factor if p.role.kind == "hidden" else 1.0) for p in model.params()]
        config = OptimConfig.model_validate({"lr": lr, "optimizer": choice})
        optimizers = half_way(build_optimizers(config, params))
        before = [p.tensor.detach().clone() for p in params]
        kinds = ("hidden", "residual_out")
        inside = [(p, start) for p, start in zip(params, before, strict=True) if p.role.kind in kinds]
        gradients(model, factor=loss_factor)
        for _ in range(2):  # the first step of some only initialises averages
            for optimizer in optimizers:
                step_of(optimizer, lambda: gradients(model, factor=loss_factor))
            if any(distance(p.tensor, start) for p, start in inside):
                break
        return {(p.name, p.role.kind): distance(p.tensor, start) for p, start in inside}

    plain, slow, small = moves(1.0, 1.0), moves(0.25, 1.0), moves(1.0, 0.1)
    for (name, kind), moved in plain.items():
        expected = moved * (0.25 if kind == "hidden" else 1.0)
        slower, smaller = slow[name, kind], small[name, kind] / moved
        assert abs(slower / expected - 1) < 0.05, f"{name} moved {slower:.2e}, its rate says {expected:.2e}"
        assert abs(smaller - 1) < 0.05, f"with gradients of a tenth {name} moves {smaller:.2f} times as far"


def check_schedule(case: Case) -> None:
    """A pure function of the step with values in [0, 1] that rises during warm-up and never ends above its peak."""
    for steps, warmup in ((100, 10), (100, 0), (7, 7)):
        multiplier = SLOTS["schedule"].build(case.choice(), steps, warmup)
        values = [multiplier(step) for step in range(steps)]
        assert all(0 <= v <= 1 for v in values), f"values outside [0, 1]: {min(values)} .. {max(values)}"
        assert values == [multiplier(step) for step in range(steps)], "not a pure function of the step"
        assert values[0] > 0, "the first step learns nothing: its rate is zero"
        assert values[:warmup] == sorted(values[:warmup]), "falls during warm-up"
        assert values[-1] <= max(values), "ends above its peak"


Check = Callable[[Case], None]
MODEL_CHECKS: tuple[Check, ...] = (
    check_builds, check_shape, check_no_look_ahead, check_loss_at_init, check_gradients, check_seed,
    check_resume_of_model, check_cached_equals_full, check_documents, check_promises, check_costs, check_bf16,
)  # fmt: skip
BY_SLOT: dict[str, tuple[Check, ...]] = {
    "optimizer": (
        check_optimizer, check_resume, check_same_on_all_ranks, check_gradients_untouched, check_rates,
    ),
    "averaging": (check_average, check_resume),
    "schedule": (check_schedule,),
    "batches": (check_batches,),
}  # fmt: skip


def checks_for(slot: str) -> tuple[Check, ...]:
    """The fast checks of a slot's components; other slots without checks get the first one only."""
    behaviour = MODEL_CHECKS if slot in MODEL_SLOTS else BY_SLOT.get(slot, ())
    return (check_documented, *behaviour)
