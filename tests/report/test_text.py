"""Numbers as people read them, and names that Markdown cannot take for markup."""

from __future__ import annotations

import math

import pytest
from markdown_it import MarkdownIt

from gpt2lab.basics import text
from gpt2lab.reports.page import csv_text

HOSTILE = [
    "<script>alert(1)</script>", '" onload="alert(1)', "javascript:alert(1)", "[x](javascript:alert(1))",
    "![x](https://example.org/x.png)", "a | b", "`<b>`", "*bold* _it_ ~~gone~~", "# head", "- item", "1. item",
    "+ item", "> quote", "&lt;", "<https://example.org>", "a\\|b", "===", "x\n\n# head", "10) item", "$x^2$",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_markdown_renders_hostile_names_as_their_own_text(name: str) -> None:
    reader = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    paragraph = [token.type for token in reader.parse(text.markdown(name))]
    assert paragraph == ["paragraph_open", "inline", "paragraph_close"]
    for tokens in (
        reader.parse(text.markdown(name)),
        reader.parse(f"| a | b |\n|---|---|\n| {text.markdown(name)} | 1 |"),
    ):
        inline = [token for token in tokens if token.type == "inline"]
        children = [child for token in inline for child in token.children or []]
        assert {child.type for child in children} <= {"text", "text_special"}
        shown = ["".join(child.content for child in token.children or []) for token in inline]
        assert text.clean(name) in shown


def test_no_cell_of_a_csv_file_is_a_formula() -> None:
    for cell in ("=1+1", "+1", "-1", "@A1", "\t=1", "\r=1"):
        assert csv_text([["a", cell]]) in (f"a,'{cell}\n", f'a,"\'{cell}"\n')
    assert csv_text([["a=1", "", -0.5, None]]) == "a=1,,-0.5,\n"


def test_a_formula_cannot_start_and_a_fence_outlasts_the_backticks_inside() -> None:
    assert "$" not in text.markdown("$x^2$")
    assert text.fenced("run ```` x").startswith("`````\n")


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (text.number(-0.00004), "0.0000"),
        (text.number(-1.5, 2), "−1.50"),
        (text.number(math.nan), "NaN"),
        (text.number(None), "–"),
        (text.signed(0.25, 2), "+0.25"),
        (text.signed(-math.inf), "−∞"),
        (text.signed(math.inf), "+∞"),
        (text.interval(-0.25, 0.5, 2), "[−0.25, +0.50]"),
        (text.interval(math.nan, 1), "–"),
        (text.quantity(124_439_808), "124 M"),
        (text.quantity(842_496), "842 k"),
        (text.quantity(999_999), "1.00 M"),
        (text.quantity(128), "128"),
        (text.quantity(9_999), "9,999"),
        (text.quantity(17_512.4), "17.5 k"),
        (text.quantity(math.nan), "–"),
        (text.memory(412_000_000), "393 MiB"),
        (text.memory(None), "–"),
        (text.change(110, 100), "+10.0 %"),
        (text.change(95, 100), "−5.0 %"),
        (text.change(300, 100), "×3"),
        (text.change(100, 100), "="),
        (text.change(1, 0), ""),
        (text.plural(1, "run"), "1 run"),
        (text.plural(2, "run"), "2 runs"),
        (text.shorten("x" * 40, 10), "x" * 9 + "…"),
        (text.time_taken(44), "44 seconds"),
        (text.time_taken(396), "6.6 minutes"),
        (text.time_taken(44_280), "12.3 hours"),
        (text.setting(0.00213), "0.00213"),
        (text.setting(2e-5), "2e-5"),
        (text.setting(1e6), "1e6"),
        (text.setting(1024), "1024"),
        (text.setting("rotary"), "rotary"),
        (text.setting(True), "True"),
    ],
)
def test_numbers(shown: str, expected: str) -> None:
    assert shown == expected


def test_names_between_backticks_stay_code() -> None:
    assert text.markdown("set `optim.lr` to *x*") == r"set `optim.lr` to \*x\*"
    assert text.markdown("`<b>`") == r"\`&lt;b&gt;\`"
