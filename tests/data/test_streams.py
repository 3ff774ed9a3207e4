"""Streams of documents: Parquet, JSON lines and Arrow files through the code that reads the hub."""

from __future__ import annotations

import gzip
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as pq
import pytest

from gpt2lab.data import corpora as rows
from gpt2lab.data import encode as encoding
from gpt2lab.data.corpora import Stream, corpus
from gpt2lab.data.prepared import Prepared
from gpt2lab.data.shards import DataConfig, prepare, prepared_key
from gpt2lab.errors import ConfigError, DataFault, EnvironmentFault

Play = Callable[..., str]


def write(path: Path, texts: list[str | None], column: str = "text") -> None:
    """A table of one column of text and one of numbers, as the name's end says, in several groups of rows."""
    table = pa.table({column: texts, "id": list(range(len(texts)))})
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=7)
    elif path.suffix == ".arrow":
        with pa.OSFile(str(path), "wb") as sink, ipc.new_stream(sink, table.schema) as out:
            out.write_table(table, max_chunksize=7)
    else:
        lines = "".join(json.dumps(row) + "\n" for row in table.to_pylist())
        path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())


@pytest.fixture(scope="session")
def stories(play: Play) -> list[str]:
    """Ninety short texts, all different."""
    return [play(f"story {i}", lines=1 + i % 5) for i in range(90)]


@pytest.fixture
def tables(tmp_path: Path, stories: list[str]) -> Callable[[str], list[str]]:
    """tables("parquet"): the stories in three files of that kind."""

    def make(kind: str) -> list[str]:
        folder = tmp_path / kind
        folder.mkdir(exist_ok=True)
        for i in range(3):
            write(folder / f"part{i}.{kind}", list(stories[30 * i : 30 * i + 30]))
        return [str(folder / f"*.{kind}")]

    return make


def config(paths: list[str], tokenizer: object = "gpt2", **options: Any) -> DataConfig:
    chosen = {"name": "documents", "paths": paths, **options}
    return DataConfig.model_validate({"corpus": chosen, "tokenizer": tokenizer, "validation_fraction": 0.2})


def stream(paths: list[str], **options: Any) -> Stream:
    made: Stream = corpus.build(config(paths, **options).corpus)
    return made


def read_back(made: Prepared, split: str) -> list[str]:
    """Documents of a split, by its separators."""
    ids = getattr(made, split)[:]
    separator = made.tokenizer.separator
    assert separator is not None and ids[-1] == separator
    parts = np.split(ids, np.flatnonzero(ids == separator)[:-1] + 1)
    return [made.tokenizer.decode(part[:-1]) for part in parts]


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "arrow", "jsonl.gz"])
def test_every_kind_of_file_gives_the_same_tokens(
    tables: Callable[[str], list[str]], stories: list[str], kind: str
) -> None:
    made = prepare(config(tables(kind)), shard_tokens=500)
    train, validation = read_back(made, "train"), read_back(made, "validation")
    # the split by hand: the first 8 bytes of the text's sha256 as a fraction
    small = [int.from_bytes(hashlib.sha256(s.encode()).digest()[:8], "big") / 2**64 < 0.2 for s in stories]
    assert validation == [s for s, low in zip(stories, small, strict=True) if low]
    assert train == [s for s, low in zip(stories, small, strict=True) if not low]
    record = made.manifest["splits"]
    assert (record["train"]["documents"], record["train"]["document_count"]) == ([], len(train))
    assert record["train"]["bytes"] == sum(len(s.encode()) for s in train)
    shards = record["train"]["shards"]
    assert sum(shard["documents"] for shard in shards) == len(train) and len(shards) > 3
    ends = made.train[:500] == made.tokenizer.separator
    assert shards[0]["documents"] == int(ends.sum())
    made.verify()


def test_order_and_processes_and_the_way_of_the_file_change_nothing(
    tables: Callable[[str], list[str]], home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 400)
    paths = tables("parquet")
    one = prepare(config(paths), processes=1)
    monkeypatch.setenv("GPT2LAB_DATA", str(tmp_path / "other"))
    two = prepare(config(paths), processes=2)
    assert one.path.parent != two.path.parent
    assert {**one.manifest, "created": 0} == {**two.manifest, "created": 0}
    monkeypatch.setenv("GPT2LAB_DATA", str(tmp_path / "third"))
    assert prepare(config(tables("arrow"))).fingerprint == one.fingerprint


def test_own_validation_files_and_other_columns(tmp_path: Path, stories: list[str]) -> None:
    write(tmp_path / "a.parquet", list(stories[:20]), "body")
    write(tmp_path / "b.jsonl", [*stories[20:30], None, ""], "body")
    write(tmp_path / "val.parquet", list(stories[30:35]), "body")
    both = [str(tmp_path / "*.parquet"), str(tmp_path / "*.jsonl")]
    made = prepare(config(both, field="body", validation_paths=[str(tmp_path / "val.parquet")]))
    assert read_back(made, "validation") == stories[30:35]
    assert read_back(made, "train") == stories[:30]
    assert made.manifest["splits"]["train"]["document_count"] == 30  # an empty text is no document


def test_without_a_separator_documents_follow_each_other(
    tables: Callable[[str], list[str]], stories: list[str]
) -> None:
    made = prepare(config(tables("jsonl"), "bytes"))
    both = made.train[:].astype(np.uint8).tobytes() + made.validation[:].astype(np.uint8).tobytes()
    assert sorted(both) == sorted("".join(stories).encode())


def test_a_tokenizer_learns_from_training_text_of_a_stream(
    tables: Callable[[str], list[str]], stories: list[str]
) -> None:
    made = prepare(config(tables("parquet"), {"name": "bpe", "vocab_size": 300}), processes=2)
    assert sorted(read_back(made, "train") + read_back(made, "validation")) == sorted(stories)


def test_identity_is_of_content_and_column_not_of_the_place(tables: Callable[[str], list[str]], tmp_path: Path) -> None:
    paths = tables("parquet")
    first = stream(paths)
    assert first.identity == stream(paths).identity != stream(paths, field="id").identity
    (tmp_path / "parquet").rename(tmp_path / "moved")
    moved = [str(tmp_path / "moved" / "*.parquet")]
    assert stream(moved).identity == first.identity
    assert first.size == pytest.approx(stream(tables("jsonl")).size, rel=0.5)
    write(tmp_path / "moved" / "part1.parquet", ["other"])
    assert stream(moved).identity != first.identity


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "arrow"])
def test_what_cannot_be_read_is_said_in_one_line(tables: Callable[[str], list[str]], tmp_path: Path, kind: str) -> None:
    paths = tables(kind)
    with pytest.raises(ConfigError, match=r"no column 'body' \(there are: id, text\)"):
        prepare(config(paths, field="body"))
    with pytest.raises(ConfigError, match="column 'id' holds int, not text"):
        prepare(config(paths, field="id"))
    (tmp_path / kind / f"part1.{kind}").write_bytes(b"{ no table")
    with pytest.raises(DataFault, match=r"cannot be read|is no Parquet") as caught:
        prepare(config(paths))
    assert len(caught.value.render().splitlines()) == 2
    assert list((tmp_path / "home" / "prepared").glob(".*.partial")) == []


def test_paths_must_be_files_of_a_known_kind(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\nx\n")
    with pytest.raises(ConfigError, match=r"'a\.csv' does not end in one of"):
        stream([str(tmp_path / "a.csv")])
    with pytest.raises(ConfigError, match="matches no file"):
        stream([str(tmp_path / "*.parquet")])


def test_a_file_that_changes_while_it_is_read_is_refused(tables: Callable[[str], list[str]], tmp_path: Path) -> None:
    made = stream(tables("jsonl"))
    with (tmp_path / "jsonl" / "part2.jsonl").open("a") as file:
        file.write('{"text": "more"}\n')
    with pytest.raises(DataFault, match="changed while it was being read"):
        list(made.open(None))


def test_a_pass_goes_on_from_any_place_and_from_places_of_such_passes(tables: Callable[[str], list[str]]) -> None:
    made = stream([*tables("parquet"), *tables("jsonl")])  # two kinds, so two parts
    whole = [text for text, _ in made.open(None)]
    place, found = None, []
    for count in (1, 11, 19, 30, 45, 1, 200):
        reading = made.open(json.loads(json.dumps(place)))
        for text, _ in reading:
            found.append(text)
            count -= 1
            if count == 0:
                break
        place = reading.place()
    assert found == whole and len(whole) == 180


def test_without_the_extra_or_a_network_it_says_what_to_do(
    tables: Callable[[str], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    class Away:
        def dataset_info(self, *_: Any, **__: Any) -> Any:
            raise OSError("Name or service not known\nand a long story")

    monkeypatch.setattr(huggingface_hub, "HfApi", Away)
    for name in ("fineweb-edu-10b", "fineweb-10b", "openwebtext", "tinystories"):
        wanted = DataConfig.model_validate({"corpus": name})
        assert prepared_key(wanted, corpus.build(wanted.corpus))  # known offline
        with pytest.raises(EnvironmentFault, match=r"hub: Name or service not known$") as caught:
            prepare(wanted)
        assert "name: documents" in str(caught.value.hint)
    monkeypatch.setitem(sys.modules, "datasets", None)
    for lacking in (DataConfig.model_validate({"corpus": "tinystories"}), config(tables("parquet"))):
        with pytest.raises(EnvironmentFault, match="datasets, which reads such corpora, is not installed") as caught:
            prepare(lacking)
        assert caught.value.hint == "pip install 'gpt2lab[data]'"


def test_the_hub_is_asked_for_one_commit_and_goes_through_the_same_reading(
    tables: Callable[[str], list[str]], stories: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library's call for the hub is answered with local files: everything behind it is the real thing."""
    import datasets
    import huggingface_hub

    paths = sorted(str(p) for p in Path(tables("parquet")[0]).parent.iterdir())
    real, asked = datasets.load_dataset, []

    def load(name: str, config: str | None = None, **how: Any) -> Any:
        if name == "parquet":
            return real(name, config, **how)
        asked.append((name, config, how))
        files = paths[:1] if how["split"] == "validation" else paths[1:]
        return real("parquet", data_files=files, split="train", streaming=True)

    class Info:
        sha = "c0ffee"

    class Api:
        def dataset_info(self, name: str, revision: str, timeout: float) -> Info:
            return Info()

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    made = prepare(DataConfig.model_validate({"corpus": "tinystories"}))
    assert read_back(made, "validation") == stories[:30]  # its own split
    assert read_back(made, "train") == stories[30:]
    assert made.manifest["corpus"]["commit"] == "c0ffee"
    assert [(name, how["split"], how["revision"]) for name, _, how in asked] == [
        ("roneneldan/TinyStories", "validation", "c0ffee"),
        ("roneneldan/TinyStories", "train", "c0ffee"),
    ]
    assert all(how["streaming"] for _, _, how in asked)
    other = rows.hub("x/y", "z", "main", size=1).open(None)
    assert len(list(other)) == 60 and asked[-1][:2] == ("x/y", "z")
