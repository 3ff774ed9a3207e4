"""Characters come whole, stop strings are cut off, and nothing is lost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2lab.data.tokenizers import Tokenizer, TokenizerSite, bytes_, gpt2
from gpt2lab.generation import Continuation

BYTES: Tokenizer = bytes_(TokenizerSite(Path()))


def shown(text: bytes, stop: list[str] | None = None) -> list[str]:
    """What each byte makes visible, and the end."""
    said = Continuation(BYTES, stop or [])
    parts = []
    for token in text:
        parts.append(said.add(token))
        if said.stopped:
            break
    parts.append(said.finish())
    assert said.text == "".join(parts)
    return parts


def test_a_character_comes_when_its_last_byte_does() -> None:
    assert shown("a\u00e9\N{GRINNING FACE}b".encode()) == ["a", "", "\u00e9", "", "", "", "\N{GRINNING FACE}", "b", ""]


def test_bytes_that_are_no_character_come_once_that_is_known() -> None:
    assert shown(b"\xffa") == ["", "\ufffda", ""]
    assert shown(b"\xe2\x82") == ["", "", "\ufffd"]
    assert shown("\ufffdx".encode()) == ["", "", "", "\ufffdx", ""]


def test_gpt2s_tokens_split_a_character() -> None:
    tokenizer = gpt2(TokenizerSite(Path()))
    ids = tokenizer.encode("x \N{GRINNING FACE} \u6f22\u5b57").tolist()
    said = Continuation(tokenizer)
    parts = [said.add(token) for token in ids]
    assert "" in parts and "\ufffd" not in "".join(parts)
    assert "".join(parts) + said.finish() == "x \N{GRINNING FACE} \u6f22\u5b57"


def test_text_ends_before_the_first_stop_string() -> None:
    assert "".join(shown(b"one. two. three", [". t"])) == "one"
    assert "".join(shown(b"abcde", ["cd", "bcd"])) == "a"
    assert "".join(shown(b"abab", ["abc"])) == "abab"
    assert shown(b"xabab!", ["abc"]) == ["x", "", "", "ab", "", "ab!", ""]
    assert "".join(shown(b"aab", ["ab"])) == "a"
    assert "".join(shown(b"anything", [""])) == "anything"


@given(st.binary(max_size=40), st.lists(st.text("ab\u00e9", min_size=1, max_size=3), max_size=2))
def test_all_that_is_shown_is_the_text_up_to_a_stop(text: bytes, stop: list[str]) -> None:
    whole = text.decode("utf-8", "replace")
    ends = [at for at in map(whole.find, stop) if at >= 0]
    assert "".join(shown(text, stop)) == whole[: min(ends, default=None)]


@given(st.text(max_size=30), st.integers(0, 9))
def test_no_part_has_a_broken_character(text: str, cut: int) -> None:
    clean = text.encode("utf-8", "replace").decode().replace("\ufffd", "")
    parts = shown(clean.encode())
    assert "\ufffd" not in "".join(parts) and "".join(parts) == clean


def test_ids_may_come_from_numpy() -> None:
    said = Continuation(BYTES)
    assert said.add(int(np.int64(65))) == "A"


@pytest.mark.parametrize("stop", ["\u00e9", "\N{GRINNING FACE}"])
def test_a_stop_string_may_be_spread_over_tokens(stop: str) -> None:
    assert "".join(shown(f"to be{stop}or not".encode(), [stop])) == "to be"
