"""Rows of tables as documents: local files, and datasets of the hub."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as pq
import pytest

from gpt2lab.data import encode
from gpt2lab.data.corpora import Stream, corpus
from gpt2lab.data.prepared import Prepared
from gpt2lab.data.shards import DataConfig, prepare, prepared_key
from gpt2lab.data.tables import hub
from gpt2lab.errors import ConfigError, DataFault, EnvironmentFault


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
        with pa.output_stream(path, compression={".gz": "gzip", ".zst": "zstd"}.get(path.suffix)) as file:
            file.write(lines.encode())


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


def tables_config(paths: list[str], tokenizer: object = "gpt2", **options: Any) -> DataConfig:
    chosen = {"name": "documents", "paths": paths, **options}
    return DataConfig.model_validate({"corpus": chosen, "tokenizer": tokenizer, "validation_fraction": 0.2})


def stream(paths: list[str], **options: Any) -> Stream:
    made: Stream = corpus.build(tables_config(paths, **options).corpus)
    return made


def read_in_passes(made: Stream, counts: Sequence[int]) -> tuple[list[str], Any]:
    """Documents by passes of at most so many each, and the place after the last."""
    place, found = None, []
    for count in counts:
        reading = made.open(json.loads(json.dumps(place)))
        found += [text for text, _ in itertools.islice(reading, count)]
        place = reading.place()
    return found, place


def read_back(made: Prepared, split: str) -> list[str]:
    """Documents of a split, by its separators."""
    ids = getattr(made, split)[:]
    separator = made.tokenizer.separator
    assert separator is not None and ids[-1] == separator
    parts = np.split(ids, np.flatnonzero(ids == separator)[:-1] + 1)
    return [made.tokenizer.decode(part[:-1]) for part in parts]


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "arrow", "jsonl.gz", "jsonl.zst"])
def test_every_kind_of_file_gives_the_same_tokens(
    tables: Callable[[str], list[str]], stories: list[str], kind: str
) -> None:
    made = prepare(tables_config(tables(kind)), shard_tokens=500)
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


BAD_LINES = ['{"text": "cut', "[1]", '{"text": 7}', '{"text": "\\ud800"', "{'text': 'x'}"]


def test_bad_documents_are_named_by_file_and_line_or_left_out_and_counted(tmp_path: Path, stories: list[str]) -> None:
    write(tmp_path / "part0.jsonl", list(stories[:30]))
    for i, line in enumerate(BAD_LINES):
        good = [json.dumps({"text": story}) for story in stories[30 : 60 + i]]
        (tmp_path / "part1.jsonl").write_text("\n".join([*good[:20], "", line, *good[20:]]))
        paths = [str(tmp_path / "*.jsonl")]
        with pytest.raises(DataFault, match=r"part1\.jsonl:22: ") as caught:
            prepare(tables_config(paths))
        assert "data.corpus.errors=skip" in str(caught.value.hint)
        made = prepare(tables_config(paths, errors="skip"))
        assert sorted(read_back(made, "train") + read_back(made, "validation")) == sorted(stories[: 60 + i])
        assert made.manifest["corpus"]["skipped"] == 1


def test_the_count_of_bad_documents_goes_on_from_any_place(tmp_path: Path, stories: list[str]) -> None:
    for i in range(3):
        lines = [line for story in stories[10 * i : 10 * i + 10] for line in (json.dumps({"text": story}), "{")]
        (tmp_path / f"part{i}.jsonl").write_text("\n".join(lines))
    made = stream([str(tmp_path / "*.jsonl")], errors="skip")
    found, place = read_in_passes(made, (1, 9, 4, 16, 99))
    assert found == stories[:30] and place["skipped"] == 30


def test_an_array_of_objects_is_read_as_rows(tmp_path: Path, stories: list[str]) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"text": story} for story in stories[:30]], indent=1))
    assert [text for text, _ in stream([str(tmp_path / "a.json")]).open(None)] == stories[:30]


def test_own_validation_files_and_other_columns(tmp_path: Path, stories: list[str]) -> None:
    write(tmp_path / "a.parquet", list(stories[:20]), "body")
    write(tmp_path / "b.jsonl", [*stories[20:30], None, ""], "body")
    write(tmp_path / "val.parquet", list(stories[30:35]), "body")
    both = [str(tmp_path / "*.parquet"), str(tmp_path / "*.jsonl")]
    made = prepare(tables_config(both, field="body", validation_paths=[str(tmp_path / "val.parquet")]))
    assert read_back(made, "validation") == stories[30:35]
    assert read_back(made, "train") == stories[:30]
    assert made.manifest["splits"]["train"]["document_count"] == 30  # an empty text is no document


def test_without_a_separator_documents_follow_each_other(
    tables: Callable[[str], list[str]], stories: list[str]
) -> None:
    made = prepare(tables_config(tables("jsonl"), "bytes"))
    both = made.train[:].astype(np.uint8).tobytes() + made.validation[:].astype(np.uint8).tobytes()
    assert sorted(both) == sorted("".join(stories).encode())


def test_a_tokenizer_learns_from_a_stream_and_threads_change_nothing(
    tables: Callable[[str], list[str]], stories: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "BATCH_CHARACTERS", 400)
    chosen = tables_config(tables("parquet"), {"name": "bpe", "vocab_size": 300})
    alone = prepare(chosen, threads=1)
    assert sorted(read_back(alone, "train") + read_back(alone, "validation")) == sorted(stories)
    monkeypatch.setenv("GPT2LAB_DATA", str(tmp_path / "other"))
    assert {**prepare(chosen, threads=2).manifest, "created": 0} == {**alone.manifest, "created": 0}


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
        prepare(tables_config(paths, field="body"))
    first = tmp_path / kind / f"part0.{kind}"
    where = f"{first}{':1' if kind == 'jsonl' else ': row 1'}: column 'id' holds int, not text"
    with pytest.raises(DataFault, match=re.escape(where)) as caught:
        prepare(tables_config(paths, field="id"))
    assert str(caught.value.hint).startswith("--set data.corpus.field=NAME, or ")
    (tmp_path / kind / f"part1.{kind}").write_bytes(b"{ no table")
    with pytest.raises(DataFault, match=rf"part1\.{kind}:.*(cannot be read|is no Parquet|no JSON)") as caught:
        prepare(tables_config(paths))
    assert len(caught.value.render().splitlines()) == 2
    assert list((tmp_path / "home" / "prepared").glob(".*.partial")) == []


def test_a_link_to_a_table_or_to_tokens_counts_by_its_own_suffix_and_name(tmp_path: Path, stories: list[str]) -> None:
    write(tmp_path / "blob.parquet", list(stories[:30]))
    (tmp_path / "blob.parquet").rename(tmp_path / "blob")
    (tmp_path / "data.parquet").symlink_to("blob")
    assert [text for text, _ in stream([str(tmp_path / "*.parquet")]).open(None)] == stories[:30]
    np.arange(999, dtype="<u2").tofile(tmp_path / "tokens")
    for name in ("train.bin", "val.bin"):
        (tmp_path / name).symlink_to("tokens")
    with pytest.raises(ConfigError, match="no file for validation among 1"):  # both are one file
        corpus.build(corpus.read({"name": "tokens", "paths": [str(tmp_path / "*.bin")]}))
    (tmp_path / "val.bin").unlink()
    np.arange(99, dtype="<u2").tofile(tmp_path / "val.bin")
    found = corpus.build(corpus.read({"name": "tokens", "paths": [str(tmp_path / "*.bin")]})).files
    assert [found[split][0].path.name for split in ("train", "validation")] == ["train.bin", "val.bin"]


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
    found, _ = read_in_passes(made, (1, 11, 19, 30, 45, 1, 200))
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
    with pytest.raises(EnvironmentFault, match="datasets, which reads such corpora, is not installed") as caught:
        prepare(DataConfig.model_validate({"corpus": "tinystories"}))
    assert caught.value.hint == "pip install 'gpt2lab[data]'"
    assert len(prepare(tables_config(tables("parquet"))).train)  # local files need no more than pyarrow


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
        chosen = paths[:1] if how["split"] == "validation" else paths[1:]
        return real("parquet", data_files=chosen, split="train", streaming=True)

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
    other = hub("x/y", "z", "main", size=1).open(None)
    assert len(list(other)) == 60 and asked[-1][:2] == ("x/y", "z")
