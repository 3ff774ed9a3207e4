"""Formatting of numbers and names for users, and escaping for Markdown."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

from gpt2lab.errors import Gpt2labError

MINUS = "\N{MINUS SIGN}"
DASH = "\N{EN DASH}"

# The baseline is ink-grey; the arms take Okabe and Ito's colours, ordered so that neighbours differ most.
BASELINE_COLOUR = "#4a5563"
ARM_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b5579b", "#e69f00", "#3fa3e0")


def arm_colour(place: int) -> str:
    """Of an arm by its place among those that are not the baseline."""
    return ARM_COLOURS[place % len(ARM_COLOURS)]


def clean(text: object) -> str:
    """One printable line: control characters, lone surrogates and direction overrides become U+FFFD, white space one
    blank. Names from files may contain them, and they are unsafe in SVG and on a terminal."""
    line = " ".join(str(text).split())
    if line.isprintable():  # most are, and this is much faster
        return line
    return "".join("\N{REPLACEMENT CHARACTER}" if _harmful(c) else c for c in line)


def harmless(text: str) -> str:
    """Text of several lines without the control characters that would move a terminal's cursor or change its
    colours."""
    return "".join(c if c in "\n\t" or not _harmful(c) else "\N{REPLACEMENT CHARACTER}" for c in text)


def _harmful(character: str) -> bool:
    return unicodedata.category(character) in _HARMFUL and character not in _JOINERS


_HARMFUL = {"Cc", "Cf", "Cs", "Cn"}
_JOINERS = "\u200c\u200d"  # part of ordinary words in several scripts


def shorten(text: str, length: int = 26) -> str:
    """`text` cut to `length` characters for a label in a figure."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def number(value: float | None, digits: int = 4) -> str:
    """A value with a fixed number of decimals; a dash for None, text for non-finite values."""
    if value is None:
        return DASH
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else MINUS + "∞"
    text = f"{value:.{digits}f}"
    return text.replace("-", MINUS) if float(text) else text.removeprefix("-")


def setting(value: object, digits: int = 4) -> str:
    """A value of a setting as typed in a config: `0.00213`, `2e-5`, `1024`, `rotary`."""
    if isinstance(value, float) and not math.isfinite(value):
        return number(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    text = str(value) if isinstance(value, int) else f"{value:.{digits}g}"
    return re.sub(r"e([+-])0*(\d)", lambda m: "e" + m[1].strip("+") + m[2], text)


def signed(value: float | None, digits: int = 4) -> str:
    """As `number`, with a plus sign for positive values."""
    text = number(value, digits)
    return "+" + text if value is not None and value > 0 and text[0] not in "+N" else text


def interval(low: float | None, high: float | None, digits: int = 4) -> str:
    """`[low, high]`, or a dash without an interval."""
    if low is None or high is None or math.isnan(low) or math.isnan(high):
        return DASH
    return f"[{signed(low, digits)}, {signed(high, digits)}]"


def quantity(value: float | None, unit: str = "") -> str:
    """Three significant digits with k, M, G, T: `4.87 M`; whole numbers below 10,000 are written out."""
    if value is None or not math.isfinite(value):
        return DASH
    suffix = ""
    if abs(value) >= 10_000:
        for suffix in ("k", "M", "G", "T", "P", "E"):  # noqa: B007 - the suffix that fits is used below
            value /= 1000
            if abs(value) < 999.5:
                break
    elif float(value).is_integer():
        return f"{int(value):,}{_unit('', unit)}"
    decimals = max(0, 3 - len(str(int(abs(value)))))
    return f"{value:.{decimals}f}{_unit(suffix, unit)}".replace("-", MINUS)


def _unit(suffix: str, unit: str) -> str:
    return f" {suffix}{unit}" if suffix or unit else ""


def memory(count: int | None) -> str:
    """Bytes in binary units."""
    if count is None:
        return DASH
    power = min(3, max(0, int(count).bit_length() - 1) // 10)
    value, unit = count / 1024**power, ("B", "KiB", "MiB", "GiB")[power]
    return f"{value:.0f} {unit}" if value >= 100 or unit == "B" else f"{value:.1f} {unit}"


def change(value: float | None, baseline: float | None) -> str:
    """How `value` compares with the baseline's, as a percentage or a factor: `+2.4 %`, `×3.1`, `=`."""
    if not value or not baseline or not (math.isfinite(value) and math.isfinite(baseline)):
        return ""
    ratio = value / baseline
    if ratio == 1:
        return "="
    if ratio >= 2 or ratio <= 0.5:
        return f"×{ratio:.2g}"
    percent = f"{100 * (ratio - 1):+.1f}".replace("-", MINUS)
    return f"{percent} %"


def in_short(value: Any) -> str:
    """A written value in one line: `rotary`, `sliding_window(window=64)`, `rotary, none`."""
    if isinstance(value, dict):
        options = ", ".join(f"{key}={in_short(inner)}" for key, inner in value.items() if key != "name")
        return f"{value['name']}({options})" if "name" in value else options
    return ", ".join(map(in_short, value)) if isinstance(value, list) else str(value)


def apart(ours: Mapping[str, Any], theirs: Mapping[str, Any], written: Callable[[Any], str] = in_short) -> list[str]:
    """What one arm changes otherwise than another: `model.norm = rmsnorm`, and `without KEY = VALUE` for the rest."""
    added = [f"{key} = {written(value)}" for key, value in ours.items() if key not in theirs or theirs[key] != value]
    return added + [f"without {key} = {written(value)}" for key, value in theirs.items() if key not in ours]


def damage_text(fault: Gpt2labError) -> str:
    """Which file is damaged, and what to do, as the reason of a run that has no value."""
    return clean(f"{fault} (try: {fault.hint})" if fault.hint else str(fault))


def plural(count: int, noun: str) -> str:
    """`1 run`, `3 runs`, `2 studies`."""
    many = f"{noun[:-1]}ies" if noun.endswith("dy") else f"{noun}s"
    return f"{count} {noun if count == 1 else many}"


def time_taken(seconds: float) -> str:
    """`44 seconds`, `6.6 minutes`, `12.3 hours`."""
    for size, name in ((3600.0, "hours"), (60.0, "minutes")):
        if seconds >= size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds:.0f} seconds"


_SPECIAL = re.compile(r"[\\`*_{}\[\]~|]|^[-+#=]|^\d+(?=[.)]\s)")


_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "$": "&#36;"}


CODE = re.compile(r"`([\w.:=@,/()\[\] -]+)`")
"""What documents show as code: names, settings and commands between backticks."""


def markdown(value: object) -> str:
    """`value` as text in Markdown, escaped so that it cannot start a tag, link, table cell, formula or list. What
    stands between backticks stays code."""
    parts = CODE.split(clean(value))  # every second one is code
    return "".join(f"`{part}`" if i % 2 else _escaped(part) for i, part in enumerate(parts))


def _escaped(value: str) -> str:
    text = _SPECIAL.sub(lambda m: m.group() + "\\" if m.group().isdigit() else "\\" + m.group(), value)
    return re.sub(r"[&<>$]", lambda m: _ENTITIES[m.group()], text)


def html_table(titles: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table for notebooks, every cell escaped."""

    def line(cells: Sequence[object], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(clean(cell))}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f"<table><thead>{line(titles, 'th')}</thead><tbody>{body}</tbody></table>"


def fenced(text: str) -> str:
    """`text` as a code block, with a fence longer than any run of backticks in it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{text}\n{fence}"


def duration(seconds: float) -> str:
    """1:05, 2:03:00, 12 days, or a dash."""
    if math.isnan(seconds):
        return "-"
    if seconds >= 4 * 86_400:
        return f"{seconds / 86_400:,.0f} days"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def seconds_of(text: str) -> float:
    """Seconds of a time written as 6h, 45m, 90s or 2d. Raises ValueError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smhd])\s*", text)
    if not match or not float(match[1]):
        raise ValueError(f"{text!r} is no time such as 6h or 45m")
    return float(match[1]) * UNITS[match[2]]
