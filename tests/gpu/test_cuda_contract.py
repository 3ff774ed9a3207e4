"""Every registered component keeps its contract on a CUDA device too, and computes there what it does on the CPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.sides import Spec, Work
from gpt2lab import testing
from gpt2lab.generation import Reader, Sampling, generate
from gpt2lab.model import GPT, MODEL_SLOTS
from gpt2lab.pretrained.huggingface import load_gpt2
from gpt2lab.registry import SLOTS
from gpt2lab.testing import checks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
MODULAR = [case for slot in MODEL_SLOTS for case in testing.cases(SLOTS[slot])]
CHECKED = [*MODULAR, *testing.cases(SLOTS["optimizer"])]


def behaviour(case: testing.Case) -> list[Any]:
    return [check for check in testing.checks_for(case.slot) if check is not testing.check_documented]


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """The contract's models and batches lie on the GPU."""
    model, batch, disturbed = testing.Case.model, testing.batch, testing.disturbed
    monkeypatch.setattr(testing.Case, "model", lambda self, **how: model(self, **how).cuda())
    monkeypatch.setattr(checks, "batch", lambda *a, **how: tuple(x.cuda() for x in batch(*a, **how)))
    monkeypatch.setattr(checks, "disturbed", lambda made: disturbed(made.cpu()).cuda())


PAIRS = [(case, check) for case in CHECKED for check in behaviour(case)]


@pytest.mark.parametrize(("case", "check"), PAIRS, ids=lambda x: str(x) if isinstance(x, testing.Case) else x.__name__)
@pytest.mark.usefixtures("on_cuda")
def test_contract(case: testing.Case, check: testing.Check) -> None:
    check(case)


def values(model: GPT, tokens: Tensor, targets: Tensor) -> tuple[Tensor, float, dict[str, Tensor]]:
    """Scores, objective, and the gradient of every parameter, in memory of the CPU."""
    with torch.no_grad():
        logits = model(tokens).cpu()
    objective, _ = model.objective(tokens, targets)
    objective.backward()
    gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    return logits, objective.item(), gradients


@pytest.mark.parametrize("case", MODULAR, ids=str)
def test_a_component_computes_what_it_computes_on_the_cpu(case: testing.Case) -> None:
    model, (tokens, targets) = testing.disturbed(case.model(n_layer=3)), testing.batch(rows=8)
    twin = copy.deepcopy(model).cuda()
    logits, objective, gradients = values(model, tokens, targets)
    found, theirs, moved = values(twin, tokens.cuda(), targets.cuda())
    assert testing.distance(found, logits) < 2e-5
    assert theirs == pytest.approx(objective, abs=1e-5)
    assert moved.keys() == gradients.keys()
    worst = max(((moved[n] - g).norm() / (g.norm() + 1e-4)).item() for n, g in gradients.items())
    assert worst < 1e-4


def naive(model: GPT, prompt: list[int], new_tokens: int) -> list[int]:
    """Greedy, by reading the whole text for each token."""
    tokens = list(prompt)
    for _ in range(new_tokens):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens], device="cuda"))[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("position", ["learned", "rotary", "alibi"])
def test_generation_with_a_cache_writes_what_reading_everything_anew_writes(position: str) -> None:
    model = testing.disturbed(testing.Case("position", position).model(block_size=64)).cuda()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)  # a fresh model hardly prefers any token
    prompts = [[5, 17, 3], [40, 2, 9, 11, 60]]
    written: list[list[int]] = [[] for _ in prompts]
    for new in generate(Reader(model, rows=len(prompts)), prompts, Sampling(temperature=0, max_new_tokens=40)):
        for sample, token in new.items():
            written[sample].append(token)
    assert len(set(written[0])) > 3  # it says something
    assert written == [naive(model, prompt, 40) for prompt in prompts]


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 2e-5), (torch.bfloat16, 5e-2)], ids=["fp32", "bf16"])
def test_scores_are_those_of_transformers(dtype: torch.dtype, close: float) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_layer": 4, "n_head": 4, "n_embd": 128, "vocab_size": 503}
    theirs: Any = GPT2LMHeadModel(GPT2Config(**sizes, n_positions=64, bos_token_id=0, eos_token_id=0)).cuda().eval()
    model = load_gpt2(theirs).cuda().eval()
    tokens = torch.randint(503, (4, 64), device="cuda")
    with torch.no_grad(), torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        gap = (model(tokens).float() - theirs(tokens).logits.float()).abs().max().item()
    assert gap < close


@pytest.mark.parametrize(("precision", "close"), [("fp32", 2e-5), ("bf16", 1e-2)])
def test_training_keeps_step_with_transformers(precision: Any, close: float) -> None:
    work = Work(n_layer=4, n_head=4, n_embd=128, block_size=64, sequences=4, vocab_size=503, bias=True)
    sides = [Spec(name, precision).make(work, torch.device("cuda")) for name in ("gpt2lab", "transformers", "plain")]
    ours, theirs, plain = ([side.step() for _ in range(10)] for side in sides)
    assert ours == pytest.approx(theirs, abs=close) and ours == pytest.approx(plain, abs=close)
