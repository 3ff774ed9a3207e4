"""The same weights in lm-evaluation-harness and here: its own task definitions, over the same documents.

Run where both are installed: pip install 'gpt2lab[lm-eval]', then pytest -m service tests/evaluation/test_lm_eval.py
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from gpt2lab.evaluation.tasks import (
    Answer,
    EncodedTask,
    Task,
    answer_task,
    documents_of,
    encode_task,
    open_task,
    task,
    task_result,
)
from gpt2lab.model import GPT, ModelConfig, build_model
from gpt2lab.pretrained.huggingface import save_gpt2
from gpt2lab.reuse.load import Trained, open_trained
from gpt2lab.store import Store

pytestmark = [pytest.mark.service, pytest.mark.filterwarnings("ignore")]

lm_eval = pytest.importorskip("lm_eval")

DOCUMENTS = 200
TOLERANCE = 1e-3  # nats, of a whole continuation
THEIRS = {"lambada": "lambada_openai"}
ON_HUB: dict[tuple[str, str | None], str] = {
    ("Rowan/hellaswag", None): "hellaswag",
    ("EleutherAI/lambada_openai", "default"): "lambada",
    ("baber/piqa", None): "piqa",
    ("allenai/ai2_arc", "ARC-Easy"): "arc_easy",
    ("allenai/ai2_arc", "ARC-Challenge"): "arc_challenge",
    ("allenai/winogrande", "winogrande_xl"): "winogrande",
}
OURS = [name for name in task.names() if name != "hellaswag_nanogpt"]


@pytest.fixture(scope="module")
def cache() -> Iterator[None]:
    """The real data: of the folder that GPT2LAB_EVAL_DATA names, else fetched into the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        if "GPT2LAB_EVAL_DATA" in os.environ:
            patch.setenv("GPT2LAB_DATA", os.environ["GPT2LAB_EVAL_DATA"])
        else:
            patch.delenv("GPT2LAB_DATA", raising=False)
        yield


@pytest.fixture(autouse=True)
def own_cache(cache: None) -> None:
    """The tests' empty cache has no place here."""


@pytest.fixture(scope="module")
def folder(cache: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small GPT-2 fitted to LAMBADA's passages, then to the first of them until it knows these by heart: it prefers
    some words to others, so choices are no near-ties, and its context is shorter than some questions."""
    config = ModelConfig(n_layer=2, n_head=2, n_embd=64, block_size=256, vocab_size=50257)
    model = build_model(config, seed=1)
    passages = documents_of(*_opened("lambada")).rows
    from gpt2lab.data.tokenizers import TokenizerSite, tokenizer

    gpt2 = tokenizer.build(tokenizer.read("gpt2"), TokenizerSite(Path()))
    texts = [gpt2.encode(row["text"])[:129] for row in passages[:600]]
    _fit(model, texts, steps=150)
    _fit(model, texts[:16], steps=300)
    return save_gpt2(model, tmp_path_factory.mktemp("weights") / "fitted")


def _opened(name: str) -> tuple[Any, Task]:
    choice = task.read(name)
    return choice, open_task(choice)


def _fit(model: GPT, texts: Sequence[NDArray[np.int64]], steps: int) -> None:
    """On four texts at a time, one after another."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for step in range(steps):
        some = [torch.from_numpy(texts[(4 * step + row) % len(texts)]) for row in range(4)]
        batch = torch.nn.utils.rnn.pad_sequence(some, batch_first=True, padding_value=-100)
        optimizer.zero_grad()
        model.loss(batch[:, :-1].clamp(min=0), batch[:, 1:]).backward()
        optimizer.step()


@pytest.fixture(scope="module")
def trained(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return open_trained(str(folder), Store(tmp_path_factory.mktemp("runs")), device=torch.device("cpu"))


@pytest.fixture(scope="module")
def local_documents(cache: None) -> Iterator[None]:
    """Their definitions load the documents that we have, instead of the hub's."""
    import datasets

    def load_dataset(path: str, name: str | None = None, **_: Any) -> Any:
        made = datasets.Dataset.from_list(rows_of(ON_HUB[path, name]))
        return datasets.DatasetDict(dict.fromkeys(("train", "validation", "test"), made))  # they score one of them

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.load_dataset", load_dataset)
        yield


def rows_of(name: str) -> list[dict[str, Any]]:
    return [dict(row) for row in documents_of(*_opened(name)).rows]


@pytest.fixture(scope="module")
def theirs(folder: Path, local_documents: None) -> dict[str, Any]:
    """Their results with their own transformers model."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=str(folder), device="cpu", batch_size=8, dtype="float32")
    asked = [THEIRS.get(name, name) for name in OURS]
    return simple_evaluate(model, tasks=asked, limit=DOCUMENTS, bootstrap_iters=1000)


@pytest.fixture(scope="module")
def through_adapter(folder: Path, local_documents: None) -> dict[str, Any]:
    """Their results with the model that we register with them."""
    from lm_eval import simple_evaluate

    import gpt2lab.reuse.lm_eval  # noqa: F401

    asked = ["hellaswag", "lambada_openai", "piqa"]
    return simple_evaluate(
        "gpt2lab", {"source": str(folder), "device": "cpu"}, tasks=asked, limit=DOCUMENTS, bootstrap_iters=0
    )


@pytest.fixture(scope="module")
def ours(trained: Trained) -> dict[str, tuple[EncodedTask, list[list[Answer]]]]:
    assert trained.tokenizer is not None
    found = {}
    for name in OURS:
        encoded = encode_task(task.read(name), trained.tokenizer, limit=DOCUMENTS)
        found[name] = (encoded, answer_task(encoded, trained.model))
    return found


def samples(results: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return sorted(results["samples"][THEIRS.get(name, name)], key=lambda sample: sample["doc_id"])


@pytest.mark.parametrize("name", OURS)
def test_requests_choices_likelihoods_and_figures_agree(name: str, theirs: Any, ours: Any) -> None:
    encoded, found = ours[name]
    seen = samples(theirs, name)
    assert len(seen) == len(encoded.questions) == min(DOCUMENTS, len(encoded.documents.rows))
    gaps, choices = [], 0
    for sample, question, said in zip(seen, encoded.questions, found, strict=True):
        asked = [tuple(one.values()) for one in sample["arguments"].values()] if isinstance(
            sample["arguments"], dict) else [tuple(one) for one in sample["arguments"]]  # fmt: skip
        assert asked == [tuple(request) for request in question.requests]
        likelihoods = [float(response[0]) for response in sample["filtered_resps"]] if len(asked) > 1 else [
            float(sample["filtered_resps"][0][0])]  # fmt: skip
        gaps += [abs(a - b.log_likelihood) for a, b in zip(likelihoods, said, strict=True)]
        choices += int(np.argmax(likelihoods) == np.argmax([one.log_likelihood for one in said]))
        for measure in encoded.task.measures:
            if measure.joined == "mean":
                assert measure.of(question, said) == sample[measure.name]
    reached = task_result(encoded, found, 256)
    print(f"\n{name}: {len(seen)} documents, {reached.cut} cut, choices equal {choices}, largest gap {max(gaps):.2e}, "
          + ", ".join(f"{one.name} {one.value:.6g} ± {one.stderr:.3g}" for one in reached.figures))  # fmt: skip
    if name == "lambada":
        assert 0 < reached.figures[0].value < 1  # else it would not matter what is greedy
    assert max(gaps) < TOLERANCE
    assert choices == len(seen)
    for one in reached.figures:
        figures = theirs["results"][THEIRS.get(name, name)]
        assert one.value == pytest.approx(figures[f"{one.name},none"], rel=1e-5)
        close = 0.25 if one.name == "perplexity" else 1e-9  # theirs is by bootstrap
        assert one.stderr == pytest.approx(figures[f"{one.name}_stderr,none"], rel=close)


@pytest.mark.parametrize("name", ["hellaswag", "lambada", "piqa"])
def test_our_model_registered_with_them_scores_the_same(name: str, theirs: Any, through_adapter: Any) -> None:
    own, foreign = (results["results"][THEIRS.get(name, name)] for results in (through_adapter, theirs))
    for key in ("acc,none", "acc_norm,none"):
        assert own.get(key) == foreign.get(key)
    if name == "lambada":
        assert own["perplexity,none"] == pytest.approx(foreign["perplexity,none"], rel=1e-5)


def test_rolling_likelihoods_agree(folder: Path) -> None:
    """Whole texts, longer than the context."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from gpt2lab.reuse.lm_eval import Gpt2labLM

    rows = documents_of(*_opened("lambada")).rows[:12]
    texts = [" ".join(row["text"] for row in rows[:6]), rows[7]["text"]]
    requests = [Instance("loglikelihood_rolling", {}, (text,), number) for number, text in enumerate(texts)]
    foreign = HFLM(pretrained=str(folder), device="cpu", batch_size=1, dtype="float32").loglikelihood_rolling(requests)
    own = Gpt2labLM(str(folder), device="cpu").loglikelihood_rolling(requests)
    assert own == pytest.approx(foreign, abs=TOLERANCE)


OWN = """
task: own
dataset_path: json
dataset_kwargs: {data_files: {validation: FILE}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "The sky is"
doc_to_target: gold
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc}]
"""


def test_the_harnesss_command_line_takes_the_model(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps({"choices": ["blue", "a"], "gold": 0}) + "\n")
    (tmp_path / "own.yaml").write_text(OWN.replace("FILE", str(tmp_path / "rows.json")))
    words = f"--model gpt2lab --model_args source={folder} --tasks own --include_path {tmp_path}".split()
    command = [sys.executable, "-m", "gpt2lab.reuse.lm_eval", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\|own +\|.*\|acc +\|", done.stdout), done.stdout
