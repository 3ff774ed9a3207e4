"""YAML text as a tree of strings with lines, and the refusals E4 and E8 to E10 of FAULTS.md."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gpt2lab.config.source import MAX_BYTES, MAX_DEPTH, MAX_VALUES, Place, read_file, read_mapping, read_override
from gpt2lab.errors import ConfigError


def refused(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read_mapping(text, "x.yaml")
    assert caught.value.exit_code == 2
    assert len(caught.value.problems) == 1 and "\n" not in str(caught.value)
    return str(caught.value)


def test_every_scalar_is_the_text_that_was_written() -> None:
    text = "a: no\nb: 012\nc: 6:30\nd: 1e-4\ne: 200e6\nf: ~\ng:\nh: '1.0'\noff: {0.5: 12:00:00, x: [null, 0x10]}\n"
    expected = {"a": "no", "b": "012", "c": "6:30", "d": "1e-4", "e": "200e6", "f": "~", "g": "", "h": "1.0"}
    inner = {"0.5": "12:00:00", "x": ["null", "0x10"]}
    assert read_mapping(text, "x.yaml").tree == {**expected, "off": inner}


def test_every_key_and_value_remembers_its_line() -> None:
    source = read_mapping("# about\na:\n  b: 1\n  c:\n  - x\n  - {d: y}\n", "x.yaml")
    lines = {key: place.line for key, place in source.places.items()}
    assert lines[("a",)] == 2 and lines[("a", "b")] == 3 and lines[("a", "c")] == 4
    assert lines[("a", "c", 0)] == 5 and lines[("a", "c", 1)] == 6 and lines[("a", "c", 1, "d")] == 6
    assert source.place(("a", "b")).prefix == "x.yaml:3: "
    assert source.place(("a", "c", 1, "missing")).line == 6  # of the nearest above
    assert source.part(("a", "c")).places[(1, "d")].line == 6


def test_e4_equal_keys_are_refused_with_both_lines() -> None:
    assert refused("a: 1\nb: 2\na: 3\n") == "x.yaml:3: 'a' is written twice, first in line 1"
    assert refused("m:\n  lr: 1\n  lr: 1\n") == "x.yaml:3: 'm.lr' is written twice, first in line 2"
    assert "written twice" in refused("a: 1\n'a': 3\n")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: &x [1]\nb: 2\n", "anchors (&x) are not accepted"),
        ("a: *x\n", "aliases (*x) are not accepted"),
        ("a: &a [*a]\n", "anchors (&a)"),
        ("a: {<<: {b: 1}}\n", "merge keys"),
        ("a: " + "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), f"nested more than {MAX_DEPTH} levels"),
        ("".join(f"k{i}: 1\n" for i in range(MAX_VALUES + 1)), f"more than {MAX_VALUES} values"),
        ("{[a]: 1}", "a key must be plain text"),
        ("a: 1\n---\nb: 2\n", "x.yaml:2: a second document"),
        ("a: [1\nb: 2\n", "x.yaml:2: not valid YAML"),
        ("a:\n\t- b\n", "indent by spaces"),
        ("a: *.txt\n", "needs quotes"),
        ("a: \0", "not valid YAML"),
        ("a: '\ud800'", "not UTF-8"),
    ],
)
def test_e8_what_yaml_has_beyond_plain_values_is_refused(text: str, sentence: str) -> None:
    assert sentence in refused(text)


def test_quoted_look_alikes_are_text() -> None:
    assert read_mapping("a: '*x'\nb: '&x'\n'<<': '!!int'\n", "x").tree == {"a": "*x", "b": "&x", "<<": "!!int"}


BOMBS = {
    "aliases": "a0: &a0 [x, x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 99)),
    "recursive": "a: &a {b: *a}\n",
    "lists": "[" * (MAX_BYTES - 10),
    "dashes": "- " * (MAX_BYTES // 2 - 10),
    "mappings": "{a: " * (MAX_BYTES // 4 - 10),
    "questions": "? " * (MAX_BYTES // 2 - 10),
    "values": "[" + "x," * (MAX_BYTES // 2 - 10),
    "too large": "a: " + "x" * MAX_BYTES,
}

MEASURE = """
import resource, sys, time
from gpt2lab.errors import ConfigError
from gpt2lab.config.source import read_file
for file in sys.argv[1:]:
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    try:
        read_file(file)
    except ConfigError:
        pass
    else:
        sys.exit(f"{file} was accepted")
    seconds, grown = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    if seconds > 1 or grown > 100 * (2**20 if sys.platform == "darwin" else 2**10):
        sys.exit(f"{file}: {seconds} s, grown by {grown}")
"""


def test_e8_bombs_are_refused_within_a_second_and_100_mb(tmp_path: Path) -> None:
    for name, text in BOMBS.items():
        (tmp_path / name).write_text(text)
    with open(tmp_path / "huge", "wb") as stream:
        stream.truncate(2**40)  # takes no space on the disk
    files = [str(tmp_path / name) for name in [*BOMBS, "huge"]]
    done = subprocess.run([sys.executable, "-c", MEASURE, *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "text",
    [
        "a: !!python/object/apply:os.system ['touch MARK']\n",
        "!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['MARK']]\n",
        "a: !!python/name:os.system ''\n",
        "!!map {a: 1}\n",
        "a: !!str 5\n",
        "a: ! 5\n",
        "!!python/tuple [a]: 1\n",
        "%TAG !p! tag:yaml.org,2002:python/\n---\na: !p!object/apply:os.system ['touch MARK']\n",
    ],
)
def test_e9_tags_are_refused_and_nothing_runs(text: str, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    assert "tags (" in refused(text.replace("MARK", str(mark)))
    assert not mark.exists()


def test_e10_what_is_no_mapping_is_refused_in_one_line(tmp_path: Path) -> None:
    assert "empty" in refused("") and "empty" in refused("# only a comment\n") and "empty" in refused("---\n")
    assert "a list at its root" in refused("- a\n")
    assert "plain text at its root" in refused("hello\n")

    def file_refused(path: Path | str) -> str:
        with pytest.raises(ConfigError) as caught:
            read_file(path)
        assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
        return str(caught.value)

    assert "a folder" in file_refused(tmp_path)
    (tmp_path / "posenc.yaml").write_text("a: 1\n")
    assert f"did you mean '{tmp_path / 'posenc.yaml'}'" in file_refused(tmp_path / "posnec.yaml")
    assert "did you mean" not in file_refused(tmp_path / "nofile.yaml")  # alike in nothing but the suffix
    assert "no such file" in file_refused("a\0b") and "no such file" in file_refused("x" * 5000)
    os.mkfifo(tmp_path / "pipe.yaml")  # it would wait for a writer, and the device has no end
    assert "no regular file" in file_refused(tmp_path / "pipe.yaml") and "no regular file" in file_refused("/dev/zero")
    (tmp_path / "latin.yaml").write_bytes("a: 1\nb: é\n".encode("latin-1"))
    assert "latin.yaml:2: not UTF-8" in file_refused(tmp_path / "latin.yaml")
    (tmp_path / "utf16.yaml").write_bytes("a: 1\n".encode("utf-16"))
    assert "not UTF-8" in file_refused(tmp_path / "utf16.yaml")


def test_e10_an_unreadable_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("a: 1\n")

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", denied)  # as root, a file without permissions can be read
    with pytest.raises(ConfigError, match="cannot be read: Permission denied"):
        read_file(file)


def test_byte_order_marks_and_windows_lines_are_read(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(b"\xef\xbb\xbfa: 1\r\nb: 2\r\n")
    assert read_file(tmp_path / "x.yaml").tree == {"a": "1", "b": "2"}


def test_overrides_are_read_as_yaml() -> None:
    key, value = read_override("model.norm={name: rmsnorm, eps: 1e-6}")
    assert (key, value.tree) == ("model.norm", {"name": "rmsnorm", "eps": "1e-6"})
    assert value.places[()] == Place("--set ")
    assert read_override("model.position=[rotary, none]")[1].tree == ["rotary", "none"]
    assert read_override("scale.caveat=")[1].tree == ""
    assert read_override("data.corpus.paths=a=b")[1].tree == "a=b"


@pytest.mark.parametrize("written", ["model.n_layer", "=3", "", "model..x=1", "a b=1", "x={a", "x=&a b", "x=!!int 3"])
def test_overrides_that_cannot_be_read_are_refused_with_their_place(written: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_override(written)
    assert str(caught.value).startswith("--set")
