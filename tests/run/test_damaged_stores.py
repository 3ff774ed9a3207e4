"""Whatever happens to a file of a finished store, commands say so in a line, and no verdict changes in silence."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gpt2lab.store import Store

Call = Callable[..., tuple[int, str]]
Mutation = Callable[[Path], None]

OTHER_TYPES = {str: 7, int: "many", float: [0.5], bool: {}, type(None): [None], list: "a list", dict: 3}


def digit(place: float) -> Mutation:
    """Another digit in the place of one, so far into the file; in its last half of a number, where it matters."""

    def change(path: Path) -> None:
        text = path.read_text()
        found = [match.start() for match in re.finditer(r"(?<=[\d.])\d(?=\d{2})", text)]
        at = found[int(place * (len(found) - 1))]
        path.write_text(text[:at] + str((int(text[at]) + 5) % 10) + text[at + 1 :])

    return change


def cut(share: float) -> Mutation:
    return lambda path: path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def content(text: str) -> Mutation:
    return lambda path: path.write_text(text) and None


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def pipe(path: Path) -> None:
    """It would wait for a writer."""
    path.unlink()
    os.mkfifo(path)


def loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def wrong_types(path: Path) -> None:
    """Every value of another type, without the seal: as a file of an older version that somebody edited."""
    record = json.loads(path.read_text().splitlines()[0] if path.suffix == ".jsonl" else path.read_text())
    record.pop("seal", None)
    path.write_text(json.dumps({key: OTHER_TYPES[type(value)] for key, value in record.items()}) + "\n")


def wrong_inside(path: Path) -> None:
    """The same one level deeper."""
    record = json.loads(path.read_text().splitlines()[0] if path.suffix == ".jsonl" else path.read_text())
    record.pop("seal", None)
    for value in record.values():
        if isinstance(value, dict):
            value |= {key: OTHER_TYPES[type(inner)] for key, inner in value.items()}
    path.write_text(json.dumps(record) + "\n")


MUTATIONS: dict[str, Mutation] = {
    "removed": Path.unlink,
    "emptied": cut(0),
    "half": cut(0.5),
    "last byte cut": lambda path: path.write_bytes(path.read_bytes()[:-2]) and None,
    "early digit": digit(0.1),
    "middle digit": digit(0.5),
    "late digit": digit(0.9),
    "a directory": directory,
    "a pipe": pipe,
    "a loop": loop,
    "deep": content("[" * 200_000 + "]" * 200_000),
    "deep object": content('{"a":' * 200_000),
    "a list": content("[]"),
    "an empty object": content("{}"),
    "not text": lambda path: path.write_bytes(bytes(range(256))) and None,
    "wrong types": wrong_types,
    "wrong types inside": wrong_inside,
}
FILES = (
    "{run}/result.json", "{run}/run.json", "{run}/config.yaml", "{run}/metrics.jsonl", "{run}/evaluations/{key}.json",
    "{run}/evaluations/windows/{key}.json", "{run}/evaluations/parts/{key}.json", "studies/{study}.json",
)  # fmt: skip
TEXT_ONLY = ("wrong types", "wrong types inside")
QUICK = [
    ("{run}/evaluations/{key}.json", "middle digit"), ("{run}/result.json", "a directory"),
    ("{run}/metrics.jsonl", "removed"), ("{run}/config.yaml", "a pipe"), ("studies/{study}.json", "late digit"),
]  # fmt: skip


def cases() -> Iterator[Any]:
    for file in FILES:
        for name in MUTATIONS:
            if not (file.endswith("yaml") and name in TEXT_ONLY):
                marks = [] if (file, name) in QUICK else [pytest.mark.slow]
                yield pytest.param(file, name, marks=marks, id=f"{file} {name}")


def verdicts(root: Path) -> Any:
    """What a report concludes, and which runs it says are missing."""
    record = json.loads((root / "reports/tiny@tiny/verdicts.json").read_text())
    return record["contrasts"], len(record["missing"])


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {"root": tmp_path_factory.mktemp("kept")}


@pytest.fixture
def finished(tiny: Path, gpt2lab: Call, inline: list[str], kept: dict[str, Path]) -> Path:
    """A finished study with its report; trained once for all tests."""
    root, before = tiny.parent, kept["root"]
    if not (before / "runs").exists():
        code, said = gpt2lab("run", str(tiny), "--no-tracking")
        assert code == 0, said
        for name in ("runs", "reports", "data-home"):
            shutil.copytree(root / name, before / name)
        kept["text"] = root
    else:
        for name in ("runs", "reports", "data-home"):
            shutil.copytree(before / name, root / name, dirs_exist_ok=True)
    del inline[:]
    return root


@pytest.mark.parametrize(("file", "mutation"), list(cases()))
def test_damage_is_said_and_changes_no_verdict_in_silence(
    finished: Path, tiny: Path, gpt2lab: Call, inline: list[str], file: str, mutation: str
) -> None:
    store = Store(finished / "runs")
    study = store.study("tiny")
    run = study.arms["rotary"].runs["1"]
    path = store.root / file.format(run=run, key=study.evaluation.key, study=study.name)
    before, others = verdicts(finished), sorted(folder.id for folder in store.runs() if folder.id != run)
    MUTATIONS[mutation](path)
    for words in (["runs"], ["show", run], ["report", "tiny"], ["run", str(tiny), "--no-tracking"]):
        code, said = gpt2lab(*words)
        assert "INTERNAL" not in said and "Traceback" not in said, said
        study_is_gone = file.startswith("studies") and mutation in ("removed", "a loop")
        assert code in ((0, 2, 3, 4) if study_is_gone else (0, 4)), said
        if words[0] == "runs":
            assert all(f"{other}  finished" in said for other in others)
        if words[0] in ("report", "run") and code == 0:
            contrasts, missing = verdicts(finished)
            assert contrasts == before[0] or missing > before[1], said
        if code == 4:
            assert "try: " in said and path.name in said, said
    assert set(inline) <= {run}
