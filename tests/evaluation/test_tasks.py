"""Tasks: requests by each protocol's words, likelihoods as transformers computes them, figures worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2lab.config import load_config
from gpt2lab.data.tokenizers import Tokenizer, TokenizerSite, tokenizer
from gpt2lab.errors import ConfigError
from gpt2lab.evaluation.tasks import (
    ACC,
    ACC_NORM,
    ACC_NORM_TOKENS,
    GREEDY,
    PERPLEXITY,
    Answer,
    Encoded,
    Question,
    Request,
    Task,
    answer_task,
    choose,
    complete,
    encode,
    encode_task,
    figure,
    log_likelihoods,
    read_tasks,
    task,
    task_result,
    written,
)
from gpt2lab.model import GPT
from gpt2lab.pretrained.huggingface import load_gpt2
from gpt2lab.training.distributed import World

BLOCK, VOCABULARY = 24, 61


def made(name: str) -> Tokenizer:
    built: Tokenizer = tokenizer.build(tokenizer.read(name), TokenizerSite(Path()))
    return built


@pytest.fixture(scope="module")
def theirs() -> GPT2LMHeadModel:
    """A transformers GPT-2 with large weights, so that its predictions differ."""
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=BLOCK, vocab_size=VOCABULARY)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6)
    return model


@pytest.fixture(scope="module")
def ours(theirs: GPT2LMHeadModel) -> GPT:
    return load_gpt2(theirs).train()


@pytest.fixture(scope="module")
def requests() -> list[Encoded]:
    """Of many lengths; some share what the model reads, the last ones are longer than the context."""
    dice = np.random.default_rng(5)
    ids = lambda n: tuple(dice.integers(0, VOCABULARY, n).tolist())  # noqa: E731
    some = [
        Encoded(ids(int(n)), ids(int(m)))
        for n, m in zip(dice.integers(1, 12, 20), dice.integers(1, 9, 20), strict=True)
    ]
    shared = ids(7)
    some += [Encoded(shared, (1,)), Encoded(shared, (2,)), Encoded(shared[:4], (*shared[4:], 3))]
    return [*some, Encoded(ids(30), ids(6)), Encoded(ids(3), ids(40)), Encoded(ids(BLOCK), ids(1))]


def alone(model: GPT2LMHeadModel, request: Encoded) -> tuple[float, bool, int]:
    """One request by itself through transformers, cut on the left as lm-evaluation-harness does."""
    whole = (request.context + request.continuation)[-(BLOCK + 1) :]
    targets = whole[-min(len(request.continuation), len(whole) - 1) :]
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([whole[:-1]])).logits[0, -len(targets) :].double()
    logs = logits.log_softmax(-1)[range(len(targets)), list(targets)]
    return logs.sum().item(), bool((logits.argmax(-1) == torch.tensor(targets)).all()), len(targets)


@pytest.mark.parametrize("tokens_at_once", [1, 40, 4096])
def test_likelihoods_are_those_of_transformers_one_by_one(
    theirs: GPT2LMHeadModel, ours: GPT, requests: list[Encoded], tokens_at_once: int
) -> None:
    told: list[tuple[int, int]] = []
    state = torch.random.get_rng_state()
    found = log_likelihoods(ours, requests, tokens_at_once=tokens_at_once, tell=lambda *at: told.append(at))
    assert torch.equal(state, torch.random.get_rng_state()) and ours.training
    for request, answer in zip(requests, found, strict=True):
        likelihood, greedy, tokens = alone(theirs, request)
        assert answer.log_likelihood == pytest.approx(likelihood, abs=1e-4)
        assert (answer.greedy, answer.tokens) == (greedy, tokens)
    assert told[-1] == (len(requests), len(requests))
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_the_likeliest_continuation_is_greedy(theirs: GPT2LMHeadModel, ours: GPT) -> None:
    tokens = [3, 1, 4]
    for _ in range(4):
        with torch.no_grad():
            tokens.append(int(theirs(torch.tensor([tokens])).logits[0, -1].argmax()))
    other = (*tokens[3:6], (tokens[6] + 1) % VOCABULARY)
    found = log_likelihoods(ours, [Encoded((3, 1, 4), tuple(tokens[3:])), Encoded((3, 1, 4), other)])
    assert [one.greedy for one in found] == [True, False]


def test_ranks_share_the_batches_and_each_knows_all(ours: GPT, requests: list[Encoded]) -> None:
    @dataclass(frozen=True)
    class Apart(World):
        """A rank that keeps its own share."""

        def sum(self, tensor: Tensor) -> Tensor:
            return tensor

    whole = log_likelihoods(ours, requests, tokens_at_once=40)
    shares = [log_likelihoods(ours, requests, tokens_at_once=40, world=Apart(rank, 3)) for rank in range(3)]
    for one, parts in zip(whole, zip(*shares, strict=True), strict=True):
        assert sum(part.tokens > 0 for part in parts) == 1
        assert sum(part.log_likelihood for part in parts) == one.log_likelihood


@pytest.mark.parametrize(
    ("request_", "context", "continuation"),
    [
        (Request("Hello, I'm a", " language model"), [15496, 11, 314, 1101, 257], [3303, 2746]),
        (Request("Hello, I'm a ", "language model"), [15496, 11, 314, 1101, 257], [3303, 2746]),
        (Request("", "Hello"), [50256], [15496]),
        (Request("  ", "Hello"), [50256], [220, 18435]),
    ],
)
def test_both_parts_as_tokens(request_: Request, context: list[int], continuation: list[int]) -> None:
    found = encode(request_, made("gpt2"))
    assert (list(found.context), list(found.continuation)) == (context, continuation)


def test_without_a_separator_the_first_token_is_the_context() -> None:
    assert encode(Request("", "ab"), made("bytes")) == Encoded((97,), (98,))
    with pytest.raises(ConfigError, match="nothing to predict in 'a'"):
        encode(Request("", "a"), made("bytes"))


ROW = {
    "activity_label": "Baking",
    "ctx_a": "[header] Mix [title] stir.",
    "ctx_b": "then the",
    "ctx": "Mix stir. then the",
}
ROW |= {"endings": ["cup [step] falls.", "oven  is hot."], "label": "1"}
EXAM = {"question": "Why?", "choices": {"text": ["so", "not so"], "label": ["A", "B"]}, "answerKey": "B"}
ASKED: dict[str, tuple[dict[str, Any], Question]] = {
    "hellaswag": (ROW, choose("Baking: Mix. stir. Then the", ["cup falls.", "oven is hot."], 1)),
    "hellaswag_nanogpt": (ROW, choose("Mix stir. then the", ["cup [step] falls.", "oven  is hot."], 1)),
    "lambada": ({"text": "He took his hat"}, Question((Request("He took his", " hat"),), 0, (4,))),
    "piqa": (
        {"goal": "Cut it", "sol1": "knife", "sol2": "spoon", "label": 0},
        choose("Question: Cut it\nAnswer:", ["knife", "spoon"], 0),
    ),
    "arc_easy": (EXAM, choose("Question: Why?\nAnswer:", ["so", "not so"], 1)),
    "arc_challenge": (EXAM, choose("Question: Why?\nAnswer:", ["so", "not so"], 1)),
    "winogrande": (
        {"sentence": "Ann paid Bea because _ was poor.", "option1": "Ann", "option2": "Bea", "answer": "2"},
        Question(
            (Request("Ann paid Bea because Ann", " was poor."), Request("Ann paid Bea because Bea", " was poor.")),
            1,
            (9, 9),
        ),
    ),
}


OURS = [one.name for one in task if one.factory.__module__ == "gpt2lab.evaluation.known_tasks"]


@pytest.mark.parametrize("name", OURS)
def test_a_document_becomes_the_requests_of_its_protocol(name: str) -> None:
    row, wanted = ASKED[name]
    asked: Task = task.build(task.read(name))
    assert asked.ask(row) == wanted
    assert all(one.name and one.how for one in asked.measures)


def said(*log_likelihoods: float, tokens: tuple[int, ...] = (), greedy: bool = False) -> list[Answer]:
    counts = tokens or (1,) * len(log_likelihoods)
    return [Answer(one, greedy, count) for one, count in zip(log_likelihoods, counts, strict=True)]


def test_lengths_are_made_equal_as_each_protocol_says() -> None:
    question = Question((Request("q", " a"),) * 3, 1, (2, 10, 4))
    answers_ = said(-4.0, -6.0, -4.8, tokens=(1, 2, 3))
    assert ACC.of(question, answers_) == 0  # -4.0 is highest
    assert ACC_NORM.of(question, answers_) == 1  # -2.0, -0.6, -1.2
    assert ACC_NORM_TOKENS.of(question, answers_) == 0  # -4, -3, -1.6
    assert ACC_NORM_TOKENS.of(Question(question.requests, 2, question.characters), answers_) == 1
    assert (
        ACC.of(Question(question.requests, 0, question.characters), said(-1.0, -1.0, -1.0)) == 1
    )  # the first of equals


def test_means_and_perplexities_with_their_standard_errors() -> None:
    question = Question((Request("q", " a"), Request("q", " b")), 0, (1, 1))
    right, wrong = said(-1.0, -2.0), said(-2.0, -1.0)
    found = figure(ACC, [question] * 4, [right, right, right, wrong])
    assert found.value == 0.75
    assert found.stderr == pytest.approx(math.sqrt(0.75 * 0.25 / 3))  # sd with n - 1, over sqrt(4)
    word = complete("q", " a")
    found = figure(PERPLEXITY, [word] * 3, [said(-1.0), said(-2.0), said(-6.0)])
    assert found.value == pytest.approx(math.exp(3))
    assert found.stderr == pytest.approx(math.exp(3) * math.sqrt(7) / math.sqrt(3))  # sd of 1, 2, 6 is sqrt(7)
    assert figure(GREEDY, [word] * 2, [said(-1.0, greedy=True), said(-1.0)]).value == 0.5
    assert figure(ACC, [question], [right]).stderr is None
    assert math.isfinite(figure(PERPLEXITY, [word], [said(-1e6)]).value)


def numbered_rows(count: int) -> Task:
    rows = [{"place": place} for place in range(count)]
    return Task(
        protocol="a test",
        documents=lambda: written(rows),
        ask=lambda row: choose(f"This is number {row['place']}, or", ["one more.", "not"], 0),
    )


@pytest.fixture
def own(no_plugins_after: None) -> Callable[[Callable[[], Any]], None]:
    """Registers a task called `own` for one test."""

    def register(factory: Callable[[], Any]) -> None:
        factory.__doc__ = "A test's."
        task.register("own", source="a test")(factory)

    return register


def test_a_limit_takes_the_first_documents_or_spreads_over_all(own: Any, ours: GPT) -> None:
    own(lambda: numbered_rows(10))
    choice = task.read("own")
    several = [encode_task(choice, made("bytes"), limit=4, spread=spread).questions for spread in (False, True)]
    numbers = [[question.requests[0].context.split()[3] for question in questions] for questions in several]
    assert numbers == [["0,", "1,", "2,", "3,"], ["0,", "2,", "5,", "7,"]]
    assert len(encode_task(choice, made("bytes"), limit=99).questions) == 10


def test_questions_that_are_cut_are_counted(own: Any) -> None:
    own(lambda: numbered_rows(2))
    from gpt2lab.model import ModelConfig, build_model

    sizes = {"n_layer": 1, "n_head": 1, "n_embd": 8, "vocab_size": 256}
    encoded = encode_task(task.read("own"), made("bytes"))  # "This is number 0, or one more." has 30 bytes
    for block, cut in ((28, 2), (29, 0)):
        model = build_model(ModelConfig.model_validate(sizes | {"block_size": block}))
        found = answer_task(encoded, model)
        reached = task_result(encoded, found, block)
        assert (reached.cut, reached.questions) == (cut, 2)
        assert [one.tokens for one in found[0]] == [10, 4]


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        (lambda: 3, "task own: TypeError: a Task is expected, not 3"),
        (lambda: Task(protocol="p", documents=lambda: written([]), ask=lambda row: row), "it has no documents"),
        (lambda: Task(protocol="p", documents=lambda: written([{}]), ask=lambda row: row["x"]), "KeyError: 'x'"),
    ],
)
def test_a_task_that_fails_is_named(own: Any, factory: Any, said: str) -> None:
    own(factory)
    with pytest.raises(ConfigError, match=said) as raised:
        encode_task(task.read("own"), made("bytes"))
    assert raised.value.problems[0].where == "task own" and "test_tasks.py" in str(raised.value.hint)


def test_tasks_are_written_with_their_options() -> None:
    found = read_tasks(["arc_easy:split=validation", " piqa", "piqa"], "--tasks")
    assert list(map(str, found)) == ["arc_easy(split=validation)", "piqa"]
    wrong = {"hellaswga": "did you mean 'hellaswag'", "arc_easy:split=dev": "'dev'", "piqa:x=1": "'x'"}
    for words, what in wrong.items():
        with pytest.raises(ConfigError, match=what):
            read_tasks([words], "--tasks")
    assert load_config("nano", ["evaluation.tasks=[piqa]"]).evaluation.tasks == ("piqa",)
    with pytest.raises(ConfigError, match="did you mean 'piqa'"):
        load_config("nano", ["evaluation.tasks=[pica]"])
