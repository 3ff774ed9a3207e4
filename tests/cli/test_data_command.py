"""`data prepare` for corpora by name, and what `data list` says of what was interrupted."""

from __future__ import annotations

import json
import random
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gpt2lab.basics import faults
from gpt2lab.data import encode
from gpt2lab.data.prepared import list_prepared, open_prepared
from gpt2lab.data.shards import DataConfig, prepare
from gpt2lab.errors import DataFault
from gpt2lab.runner import Job, StopRequest, execute

Call = Callable[..., Any]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("GPT2LAB_DATA", str(tmp_path / "home"))
    monkeypatch.setattr(encode, "BATCH_CHARACTERS", 2_000)
    rng = random.Random(0)
    words = [f"word{i}" for i in range(40)]
    lines = [json.dumps({"body": " ".join(rng.choices(words, k=30))}) + "\n" for _ in range(200)]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    yield
    faults.arm("")


def test_a_corpus_is_prepared_by_its_name(gpt2lab: Call, tmp_path: Path) -> None:
    answer = gpt2lab("data", "prepare", "documents", "--tokenizer", "bytes", "--threads", "2",
                     "--set", "data.corpus.paths=[a.jsonl]", "--set", "data.corpus.field=body")  # fmt: skip
    assert answer.code == 0, answer.err
    [row] = json.loads(gpt2lab("data", "list", "--json").out)["data"]
    assert (row["corpus"], row["tokenizer"], row["usable"]) == ("documents", "bytes", True)
    whole = gpt2lab("data", "check")
    assert whole.code == 0 and ": whole" in whole.out


@pytest.mark.usefixtures("no_plugins_after")
def test_the_corpus_and_tokenizer_of_the_documentation_work_from_a_plugin(gpt2lab: Call, tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "extending.md").read_text()
    (block,) = re.findall(r"^```python\n(# poems.py\n.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "poems.py").write_text(block)
    command = ["data", "prepare", "haiku", "--tokenizer", "letters", "--plugin", "poems.py"]
    assert " ".join(["gpt2lab", *command]) in page
    answer = gpt2lab(*command, "--threads", "2")
    assert answer.code == 0, answer.err
    [row] = json.loads(gpt2lab("data", "list", "--json").out)["data"]
    made = open_prepared(row["path"])
    assert (row["corpus"], row["tokenizer"], made.vocab_size) == ("haiku", "letters", 31)
    text = made.tokenizer.decode(made.train[:])
    assert text.startswith("the pond is silent\na frog jumps in, number ?\nthe sound of water\n<end>the pond")
    record = made.manifest["splits"]["train"]
    assert record["bytes"] == int(made.byte_lengths[made.train[:]].sum())
    assert {document["name"] for document in record["documents"]} <= {f"poem {i}" for i in range(20)}
    contract = gpt2lab("test-plugin", "poems.py")
    assert contract.code == 0 and contract.out.count(", 0 failed") == 2
    other = gpt2lab(*command, "--set", "data.corpus.count=12", "--set", "data.tokenizer.known=abc")
    assert other.code == 0 and len(json.loads(gpt2lab("data", "list", "--json").out)["data"]) == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["openwebtxt"], "unknown corpus 'openwebtxt'; did you mean 'openwebtext'?"),
        (["documents"], "needs the option 'paths'"),
        (["tokens", "--set", "data.corpus.paths=[none*.bin]"], "'none*.bin' matches no file"),
        (
            ["tokens", "--set", "data.corpus.paths=[x.bin]", "--tokenizer", "bytes"],
            "holds tokens of gpt2, not of bytes",
        ),
        (["shakespeare", "--tokenizer", "bype"], "unknown tokenizer 'bype'; did you mean 'bpe'?"),
        (["shakespeare", "--set", "data.validation_fractoin=0.1"], "validation_fraction"),
    ],
)
def test_mistakes_are_told(gpt2lab: Call, words: list[str], said: str) -> None:
    answer = gpt2lab("data", "prepare", *words)
    assert answer.code == 2 and said in answer.err


def test_tokens_changed_in_place_stop_a_study_before_it_plans_or_trains(
    gpt2lab: Call, ablation: Path, trained: Callable[..., Any], tmp_path: Path
) -> None:
    trained(steps=4)
    [(path, _)] = list_prepared()
    job = Job.read(next((tmp_path / "runs").glob("*/job.json")))
    (tmp_path / "runs" / job.run_id / "result.json").unlink()
    shard = path / "validation_000.bin"
    tokens = bytearray(shard.read_bytes())
    tokens[:100] = reversed(tokens[:100])
    shard.write_bytes(tokens)
    answer = gpt2lab("run", ablation, "--no-tracking", "--seeds", "2")
    first, second = answer.err.strip().splitlines()[-2:]
    assert answer.code == 4 and f"error [DATA] {shard}: damaged" in first
    assert second == f"try: rm -r {path}, then prepare it again"
    with pytest.raises(DataFault, match=r"validation_000\.bin: damaged"):
        execute(job, StopRequest())


def test_the_command_that_data_list_shows_continues(gpt2lab: Call, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("gpt2lab.data.shards.STATE_SECONDS", 0.0)
    chosen = {"name": "documents", "paths": [str(tmp_path / "a.jsonl")], "field": "body"}
    tokenizer = {"name": "bpe", "vocab_size": 280}
    config = DataConfig.model_validate({"corpus": chosen, "tokenizer": tokenizer, "validation_fraction": 0.2})
    faults.arm("raise@data.state:4")
    with pytest.raises(faults.InjectedFault):
        prepare(config)
    faults.arm("")
    told = gpt2lab("data", "list").out
    path, _, command = told.strip().partition("  unfinished, about ")
    assert path.endswith(".partial") and 0 < int(command.partition(" %; ")[0]) < 100
    words = shlex.split(command.partition(" %; ")[2].removesuffix(" continues"))
    assert words[:3] == ["gpt2lab", "data", "prepare"]
    answer = gpt2lab(*words[1:])
    assert answer.code == 0, answer.err
    [row] = json.loads(gpt2lab("data", "list", "--json").out)["data"]
    assert row["usable"] and f".{Path(row['path']).name}.partial" == Path(path).name
