"""Text in chunks, and its division into training and validation."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gpt2lab.data.corpora import Document, decoded
from gpt2lab.data.encode import Part, between, divide
from gpt2lab.data.files import READ_BYTES
from gpt2lab.errors import ConfigError

AWKWARD = "naïve 🙂\r\nline\0two\n字字字\n"


def document(name: str, text: str) -> Document:
    return Document(name, len(text.encode()), lambda: iter([text[:7], text[7:]]))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 1000])
def test_text_is_kept_as_it_is_however_the_bytes_are_cut(size: int) -> None:
    raw = AWKWARD.encode()
    blocks = [raw[i : i + size] for i in range(0, len(raw), size)]
    assert "".join(decoded(blocks, where="x")) == AWKWARD


@pytest.mark.parametrize("size", [1, 2, 1000])
def test_only_a_byte_order_mark_at_the_start_is_dropped(size: int) -> None:
    raw = b"\xef\xbb\xbf" + "a\ufeffb".encode()
    assert "".join(decoded([raw[i : i + size] for i in range(0, len(raw), size)], where="x")) == "a\ufeffb"


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("raw", "line", "byte"),
    [
        (b"ok\n\xff", 2, 3),
        ("é\n\nab".encode() + b"\xe9t\xe9", 3, 6),
        (b"a\nbc\xe2\x82", 2, 4),  # ends inside a character
        (b"\xff\xfeh\x00", 1, 0),  # UTF-16
    ],
)
def test_bad_utf8_names_file_line_and_byte_and_offers_to_replace(size: int, raw: bytes, line: int, byte: int) -> None:
    blocks = [raw[i : i + size] for i in range(0, len(raw), size)]
    with pytest.raises(ConfigError) as caught:
        list(decoded(blocks, where="f.txt"))
    assert f"f.txt:{line}: byte {byte} (0x{raw[byte]:02x}) is not UTF-8" in caught.value.render()
    assert "errors: replace" in str(caught.value.hint)
    assert "\ufffd" in "".join(decoded(blocks, where="f.txt", errors="replace"))


def test_one_endless_line_is_read_in_bounded_chunks() -> None:
    read = 0

    def endless() -> Iterator[bytes]:
        nonlocal read
        while True:
            read += 1
            yield b"x" * READ_BYTES

    chunks = decoded(endless(), where="x")
    assert [len(next(chunks)) for _ in range(3)] == [READ_BYTES] * 3
    assert read == 3


@pytest.mark.parametrize("cuts", [[3], [1, 2, 9], [7, 8]])
def test_parts_that_share_a_border_lose_and_double_nothing(cuts: list[int]) -> None:
    chunks = [AWKWARD[a:b] for a, b in zip([0, *cuts], [*cuts, len(AWKWARD)], strict=True)]
    for border in range(len(AWKWARD.encode()) + 2):
        head, tail = "".join(between(chunks, 0, border)), "".join(between(chunks, border, None))
        assert head + tail == AWKWARD
        assert border <= len(head.encode()) <= border + 3 or head == AWKWARD


def test_few_documents_are_split_by_position() -> None:
    documents = [document(f"d{i}", "é" * 50) for i in range(9)]
    parts = divide(documents, 0.1)
    assert ["".join(p.chunks()) for p in parts["train"]] == ["é" * 45] * 9
    assert ["".join(p.chunks()) for p in parts["validation"]] == ["é" * 5] * 9
    assert sum(p.size for ps in parts.values() for p in ps) == 900


def test_many_documents_are_split_whole_by_hash_of_name_until_the_fraction_is_reached() -> None:
    documents = [document(f"d{i:02d}", "x" * 100) for i in range(40)]
    parts = divide(documents, 0.1)
    names = {split: [p.document.name for p in ps] for split, ps in parts.items()}
    # The four smallest sha256 of d00 ... d39, taken with `sha256sum`.
    assert names["validation"] == ["d01", "d04", "d06", "d34"]
    assert sorted(names["train"] + names["validation"]) == [d.name for d in documents]
    # One more document changes nothing for the others.
    more = {p.document.name for p in divide([*documents, document("e", "x")], 0.1)["validation"]}
    assert set(names["validation"]) <= more


def test_a_huge_document_is_passed_over_and_only_huge_ones_are_split_by_position() -> None:
    sizes = {f"d{i:02d}": 100 for i in range(30)}
    for huge in sizes:
        documents = [document(name, "x" * (3000 if name == huge else size)) for name, size in sizes.items()]
        validation = divide(documents, 0.05)["validation"]
        assert huge not in [p.document.name for p in validation]
        assert 0.04 * 5900 < sum(p.size for p in validation) < 0.1 * 5900
    even = divide([document(f"d{i}", "x" * 100) for i in range(10)], 0.05)["validation"]
    assert [p.size for p in even] == [5] * 10


def test_a_whole_part_reads_its_document_as_it_is() -> None:
    assert list(Part(document("d", AWKWARD)).chunks()) == [AWKWARD[:7], AWKWARD[7:]]
