"""A thousand broken files: each loads or is refused in plain words, within a second. Nothing else may come out."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gpt2lab.config import PRESETS, config_from_text, load_config
from gpt2lab.errors import ConfigError
from gpt2lab.planning.ablation import load_ablation

FILES = 1_000
ABLATIONS = sorted((Path(__file__).parents[2] / "ablations").glob("*.yaml"))
ODD = ["", "~", "[]", "{}", "[1, [2]]", "{a: {b: c}}", "yes", "-0", "0x1F", "1_000", "1e999", "nan", "9" * 400]
ODD += ["!!python/object/apply:os.system ['touch ran']", "!!int 3", "&a x", "*a", "<<: {a: 1}", "? x", "---", "..."]
ODD += [*"'\"\t\0ü\U0001f600-#|>%@`\ufeff\x85²\u2028", ": "]
ODD += ["x" * 5000, "{name: rmsnorm, eps: x}"]


def characters(text: str, dice: random.Random) -> str:
    """Some characters removed, doubled or replaced."""
    symbols = list(text)
    for _ in range(dice.randint(1, 4)):
        at = dice.randrange(len(symbols))
        symbols[at] = dice.choice(["", symbols[at] * 2, dice.choice(":-[]{}#&*!|>'\"%@`,? \n\t0xé\0")])
    return "".join(symbols)


def lines(text: str, dice: random.Random) -> str:
    """A line removed, doubled, moved, indented or without its end."""
    rows = text.split("\n")
    at, to = dice.randrange(len(rows)), dice.randrange(len(rows))
    row = rows.pop(at)
    indented, cut = " " * dice.randint(1, 5) + row, row[: dice.randint(0, len(row))]
    rows[to:to] = dice.choice([[], [row], [row, row], [indented], [cut]])
    return "\n".join(rows)


def values(text: str, dice: random.Random) -> str:
    """The value of a key replaced by something odd, or by the value of another."""
    rows = text.split("\n")
    keyed = [i for i, row in enumerate(rows) if ":" in row] or [0]
    at = dice.choice(keyed)
    other = rows[dice.choice(keyed)].partition(":")[2]
    rows[at] = rows[at].partition(":")[0] + ": " + dice.choice([*ODD, other])
    return "\n".join(rows)


def insertions(text: str, dice: random.Random) -> str:
    """Something odd anywhere."""
    at = dice.randrange(len(text))
    return text[:at] + dice.choice(ODD) + text[at:]


def nesting(text: str, dice: random.Random) -> str:
    """Brackets or indentation far too deep."""
    bracket = dice.choice(["[", "{a: ", "- ", "? ", "[{"])
    return dice.choice([text + "\nx: ", ""]) + bracket * dice.choice([5, 31, 40, 5000])


def keys(text: str, dice: random.Random) -> str:
    """A word of the file in the place of another."""
    words = [word for word in text.replace(":", " ").replace(",", " ").split() if word.isidentifier()] or ["a"]
    return text.replace(dice.choice(words), dice.choice(words), dice.randint(1, 2))


MUTATIONS: list[Callable[[str, random.Random], str]] = [characters, lines, values, insertions, nesting, keys]


def broken(text: str, dice: random.Random) -> bytes:
    """The text after one to three mutations, sometimes with bytes that are no text."""
    for _ in range(dice.randint(1, 3)):
        text = dice.choice(MUTATIONS)(text or "a: b", dice)
    raw = text.encode("utf-8", "replace")
    if dice.random() < 0.05:
        at = dice.randrange(len(raw) + 1)
        raw = raw[:at] + dice.randbytes(dice.randint(1, 20)) + raw[at:]
    return raw


def outcome(of_ablation: bool) -> Exception | None:
    """What comes out of loading x.yaml; what loads must also survive being written and read."""
    try:
        if of_ablation:
            load_ablation("x.yaml")
        else:
            config = load_config("x.yaml")
            assert config_from_text(config.to_yaml()) == config
    except Exception as error:
        return error
    return None


@pytest.mark.parametrize("part", range(4))
def test_broken_files_load_or_are_refused(part: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    dice = random.Random(part)
    presets = [path.read_text() for path in sorted(PRESETS.glob("*.yaml"))]
    presets.append(load_config("nano", ["model.position=[rotary, none]", "model.stack=[value_residual]"]).to_yaml())
    ablations = [path.read_text().replace("base: gpt2-124m", "base: nano") for path in ABLATIONS]
    loaded = refused = 0
    for number in range(FILES // 4):
        of_ablation = dice.random() < 0.5
        raw = broken(dice.choice(ablations if of_ablation else presets), dice)
        Path("x.yaml").write_bytes(raw)
        began = time.process_time()
        error = outcome(of_ablation)
        assert time.process_time() - began < 1, raw
        assert error is None or isinstance(error, ConfigError), f"file {number} of part {part}: {error!r}\n{raw!r}"
        if error is None:
            loaded += 1
        else:
            assert error.exit_code == 2 and error.problems, raw
            assert all(line.isprintable() for line in error.render().split("\n")), raw
            refused += 1
    assert loaded > 20 and refused > 100  # the mutations reach both ends
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.yaml"]  # nothing ran, nothing was written
