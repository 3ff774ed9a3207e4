"""A component in a file outside the package is listed, explained, contract-tested and used from YAML, and the package
knows nothing of it."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gpt2lab import testing
from gpt2lab.config import config
from gpt2lab.store import Store

Call = Callable[..., Any]

pytestmark = pytest.mark.usefixtures("no_plugins_after", "forks")

SINE = '''
import torch
from torch import nn

from gpt2lab.components.mlp import MLP, mlp


class Sine(nn.Module):
    def __init__(self, frequency):
        super().__init__()
        self.frequency = frequency

    def forward(self, u):
        return torch.sin(self.frequency * u)


@mlp.register("sine", source="arXiv:2006.09661")
def sine(site, *, frequency: float = 1.0) -> nn.Module:
    """One hidden layer bent by a sine.  (B, T, C) -> (B, T, C)

    c_proj(sin(frequency c_fc(x)))
    frequency: of the sine, in radians per unit.
    """
    return MLP(site, Sine(frequency))
'''
AHEAD = '''
import torch
from torch import nn

from gpt2lab.components.norm import norm


class Ahead(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.weight * (x - x.mean(-2, keepdim=True))


@norm.register("ahead", source="a mistake")
def ahead(site) -> nn.Module:
    """Subtracts the mean over all tokens, the later ones too.  (..., C) -> (..., C)"""
    return Ahead(site.width or site.dims.n_embd)
'''
DEAF = '''
import torch
from torch import nn

from gpt2lab.components.mlp import MLP, mlp


class Deaf(MLP):
    def __init__(self, site):
        super().__init__(site, torch.relu)
        self.unused = nn.Parameter(torch.ones(3))


@mlp.register("deaf", source="a mistake")
def deaf(site, *, loud: float = 1.0) -> nn.Module:
    """One hidden layer beside a parameter that nothing uses.  (B, T, C) -> (B, T, C)"""
    return Deaf(site)
'''
MUTE = """from gpt2lab.components.mlp import mlp


@mlp.register("mute", source="a mistake")
def mute(site):
    return None
"""
BROKEN = '''

@mlp.register("broken", source="a mistake")
def broken(site) -> nn.Module:
    """An MLP with a misspelt size.  (B, T, C) -> (B, T, C)"""
    return nn.Linear(site.dims.n_embed, 4)
'''
UNTYPED = '''from torch import nn

from gpt2lab.components.mlp import mlp


@mlp.register("untyped", source="a mistake")
def untyped(site, *, speed=1.0) -> nn.Module:
    """An MLP with an option of any type."""
'''
STRANGER = '''from torch import nn

from gpt2lab.components.stack import stack


@stack.register("stranger", source="a mistake")
class Stranger(nn.Module):
    """A part of the stack that is no CrossLayer."""
'''
NARROW = '''
from torch import nn

from gpt2lab.components.attention import GroupedAttention, attention


@attention.register("narrow", source="a test", can=("rotate",))
def narrow(site) -> nn.Module:
    """Attention of which we say that it adds no biases to its scores.  (B, T, C) -> (B, T, C)"""
    return GroupedAttention(site, site.dims.n_head)
'''


@pytest.fixture
def plugin(tmp_path: Path) -> Callable[[str], Path]:
    """Write a plug-in's file, in a folder of its own."""

    def write(text: str) -> Path:
        file = tmp_path / "elsewhere" / "my-parts.py"
        file.parent.mkdir()
        file.write_text(text)
        return file

    return write


def test_a_plugin_is_listed_and_explained(gpt2lab: Call, plugin: Callable[[str], Path]) -> None:
    file = plugin(SINE)
    assert "sine " not in gpt2lab("components", "mlp").out
    answer = gpt2lab("components", "mlp", "--plugin", file)
    assert answer.code == 0
    assert re.search(r"^  sine +One hidden layer bent by a sine\..*arXiv:2006\.09661", answer.out, re.M)
    listed = json.loads(gpt2lab("components", "mlp", "--plugin", file, "--json").out)["slots"]["mlp"]
    assert listed[-1]["name"] == "sine" and listed[-1]["file"] == "my-parts.py"
    assert listed[-1]["options"] == {"frequency": {"type": "float", "default": 1.0}}
    told = gpt2lab("explain", "mlp=sine,frequency=30", "--plugin", file)
    assert told.code == 0 and "c_proj(sin(frequency c_fc(x)))" in told.out
    assert "124,439,808 parameters at gpt2-124m (+0 against canonical)" in told.out
    assert 'yaml:    model.mlp: {"name": "sine", "frequency": 30.0}' in told.out and f"code:    {file}" in told.out
    assert gpt2lab("explain", "mlp=sin", "--plugin", file).err.startswith(
        "gpt2lab: error [CONFIG] mlp=sin: unknown mlp 'sin'; did you mean 'sine'?"
    )


def test_a_good_plugin_passes_the_contract_tests(gpt2lab: Call, plugin: Callable[[str], Path]) -> None:
    """With two ranks, which are processes of their own and have to load it themselves."""
    answer = gpt2lab("test-plugin", plugin(SINE))
    checks = len(testing.checks_for("mlp")) + 3  # compilation, neighbours, and two ranks
    assert answer.out == f"mlp=sine: {checks} checks on 1 variant, 0 failed\n" and answer.code == 0


@pytest.mark.parametrize(
    ("text", "head", "failed"),
    [
        (
            AHEAD,
            "norm=ahead",
            {"no_look_ahead": "the component looks ahead: logits of token "},
        ),
        pytest.param(
            DEAF,
            "mlp=deaf",
            {
                "gradients": r"no gradient reaches h\.0\.mlp\.unused, h\.1\.mlp\.unused",
                "documented": r"the docstring does not explain loud \(write 'option: meaning'\)",
            },
            marks=pytest.mark.slow,
        ),
    ],
    ids=["looks ahead", "has a parameter without gradient"],
)
def test_a_bad_plugin_is_told_which_checks_it_fails(
    text: str,
    head: str,
    failed: dict[str, str],
    gpt2lab: Call,
    plugin: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(testing, "two_ranks_against_one", lambda todo: [0.0] * len(todo))  # takes long
    answer = gpt2lab("test-plugin", plugin(text))
    assert answer.code == 2 and answer.err == ""
    summary, *told = answer.out.splitlines()
    assert re.fullmatch(rf"{head}: \d+ checks on 1 variant, {len(told)} failed", summary), answer.out
    for check, why in failed.items():
        assert any(re.match(f"  {head} {check}: {why}", line) for line in told), (check, told)
    if head == "mlp=deaf":
        assert len(told) == 2


def test_checks_and_components_can_be_chosen(gpt2lab: Call, plugin: Callable[[str], Path]) -> None:
    """A component that cannot be built does not keep the others from their checks."""
    file = plugin(SINE + BROKEN)
    answer = gpt2lab("test-plugin", file, "--check", "seed", "--check", "builds")
    assert answer.code == 2 and answer.out.splitlines() == [
        "mlp=sine: 2 checks on 1 variant, 0 failed",
        "mlp=broken: 1 check on 1 variant, 1 failed",
        "  mlp=broken builds: AttributeError at my-parts.py:30: 'ModelConfig' object has no attribute 'n_embed'",
    ]
    chosen = gpt2lab("test-plugin", file, "--check", "seed", "--component", "mlp=sine")
    assert (chosen.code, chosen.out) == (0, "mlp=sine: 1 check on 1 variant, 0 failed\n")
    for words, said in (
        (("--check", "sead"), "--check: unknown check 'sead'; did you mean 'seed'?"),
        (("--component", "sin"), "--component: unknown component 'sin'; did you mean 'sine'?"),
    ):
        answer = gpt2lab("test-plugin", file, *words)
        assert answer.code == 2 and said in answer.err


def test_an_error_in_a_plugin_names_its_line(gpt2lab: Call, plugin: Callable[[str], Path]) -> None:
    file = plugin(SINE + BROKEN)
    answer = gpt2lab("explain", "mlp=broken", "--plugin", file)
    line = (SINE + BROKEN).partition("n_embed")[0].count("\n") + 1
    assert answer.code == 2 and answer.err.splitlines() == [
        f"gpt2lab: error [CONFIG] {file}:{line}: this plug-in raised AttributeError: 'ModelConfig' object has no "
        "attribute 'n_embed'",
        f"try: gpt2lab test-plugin {file}; for the trace, add --debug",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (UNTYPED, ":6: plug-in failed to load: ValueError: mlp 'untyped': option 'speed' has no type"),
        (STRANGER, ":6: plug-in failed to load: ValueError: stack 'stranger' does not derive from gpt2lab.components."),
        (MUTE, ":4: plug-in failed to load: ValueError: mlp 'mute' has no docstring"),
        ("import torch\n\ndef broken(:\n", ":3: plug-in failed to load: invalid syntax"),
        ("import torch\nimport no_such_module\n", ":2: plug-in failed to load: ModuleNotFoundError: No module named"),
        (MUTE.replace("mute", "gelu"), ":4: plug-in failed to load: ValueError: mlp 'gelu' is registered already"),
        ("x = 1\n", ": nothing in it has contract tests"),
        ("import sys\nsys.exit(3)\n", ":2: plug-in failed to load: SystemExit: 3"),
        ("class X(BaseException): ...\n\nraise X(7)\n", ":3: plug-in failed to load: X: 7"),
    ],
    ids=[
        "no type",
        "another class",
        "no docstring",
        "syntax error",
        "missing module",
        "a name that is taken",
        "nothing",
        "an exit",
        "no exception",
    ],
)
def test_a_plugin_that_cannot_be_loaded_says_where_and_why(
    text: str, said: str, gpt2lab: Call, plugin: Callable[[str], Path]
) -> None:
    file = plugin(text)
    answer = gpt2lab("test-plugin", file)
    assert answer.code == 2 and answer.out == ""
    assert answer.err.startswith(f"gpt2lab: error [CONFIG] {file}{said}") and "\ntry: " in answer.err
    assert "Traceback" not in answer.err and answer.err.count("\n") == 2


def test_a_plugin_is_a_python_file(gpt2lab: Call, tmp_path: Path) -> None:
    (tmp_path / "loop.py").symlink_to("loop.py")
    answer = gpt2lab("components", "--plugin", "loop.py")
    assert answer.code == 2 and "no such plug-in file" in answer.err
    (tmp_path / "parts.txt").write_text("x = 1")
    answer = gpt2lab("components", "--plugin", "parts.txt")
    assert answer.code == 2 and "parts.txt: a plug-in is a Python file" in answer.err


def test_an_ablation_uses_a_plugin(
    gpt2lab: Call, plugin: Callable[[str], Path], ablation: Path, tmp_path: Path, forks: None
) -> None:
    """Its workers are processes of their own and have to load it themselves."""
    file = plugin(SINE)
    arm = "sine: {model.mlp: {name: sine, frequency: 2}}"
    ablation.write_text(ablation.read_text().replace("rotary: {model.position: rotary}", arm))
    without = gpt2lab("check", ablation)
    assert without.code == 2 and "ablation.yaml:8: arms.sine.model.mlp: unknown mlp 'sine'" in without.err
    assert "a plug-in's: --plugin FILE" in without.err
    assert gpt2lab("check", ablation, "--plugin", file).code == 0
    answer = gpt2lab("run", ablation, "--plugin", file, "--no-tracking")
    assert answer.code == 0, answer.err
    assert "0 runs found finished, 2 trained now" in answer.out
    store = Store(tmp_path / "runs")
    record = store.study("tiny@preset")
    assert record["arms"]["sine"]["components"]["mlp"] == "sine(frequency=2.0)"
    assert f"--plugin {file}" in record["reproduce"]
    learned, sine = (store.run(record["arms"][arm]["runs"]["0"]) for arm in ("learned", "sine"))
    assert learned.status() == sine.status() == "finished"
    last = [run.rows()[-1]["metrics"]["val/loss"] for run in (learned, sine)]
    assert last[0] != last[1] and all(4 < loss < 7 for loss in last)
    plan = json.loads(gpt2lab("run", ablation, "--plugin", file, "--dry-run", "--json").out)
    assert [arm["finished"] for arm in plan["arms"]] == [["0"], ["0"]] and plan["seconds"] == 0


def test_an_edited_plugin_trains_its_arms_again(gpt2lab: Call, plugin: Callable[[str], Path], ablation: Path) -> None:
    file = plugin(SINE)
    arm = "sine: {model.mlp: sine}"
    ablation.write_text(ablation.read_text().replace("rotary: {model.position: rotary}", arm))

    def ids(file: Path) -> dict[str, str]:
        plan = json.loads(gpt2lab("run", ablation, "--plugin", file, "--dry-run", "--json").out)
        forget()
        return {arm["arm"]: arm["runs"]["0"] for arm in plan["arms"]}

    def forget() -> None:
        from gpt2lab.registry import PLUGINS, SLOTS

        del SLOTS["mlp"]._components["sine"]
        PLUGINS.clear()

    first = ids(file)
    moved = file.with_name("moved.py")
    moved.write_text(SINE.replace("One hidden layer bent", "A hidden layer, bent"))
    assert ids(moved) == first
    edited = file.with_name("edited.py")
    edited.write_text(SINE.replace("torch.sin(", "torch.cos("))
    changed = ids(edited)
    assert changed["learned"] == first["learned"] and changed["sine"] != first["sine"]


def test_what_a_plugin_cannot_do_is_refused_with_the_reason(
    gpt2lab: Call, plugin: Callable[[str], Path], ablation: Path
) -> None:
    file = plugin(NARROW)
    text = ablation.read_text()
    ablation.write_text(text.replace("{model.position: rotary}", "{model.attention: narrow, model.position: rotary}"))
    assert gpt2lab("check", ablation, "--plugin", file).code == 0
    ablation.write_text(text.replace("{model.position: rotary}", "{model.attention: narrow, model.position: alibi}"))
    answer = gpt2lab("check", ablation, "--plugin", file)
    assert answer.code == 2
    assert answer.err.startswith(
        f"gpt2lab: error [CONFIG] {ablation}:8: arms.rotary.model.position: alibi needs 'bias' from the attention, "
        "which narrow does not offer (those that do: mha, gqa, "
    )


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Make an installed package that offers a module under the entry-point group."""
    monkeypatch.syspath_prepend(tmp_path / "site")

    def install(text: str) -> None:
        record = tmp_path / "site" / "their_parts-1.0.dist-info"
        record.mkdir(parents=True)
        (record / "METADATA").write_text("Metadata-Version: 2.1\nName: their-parts\nVersion: 1.0\n")
        (record / "entry_points.txt").write_text("[gpt2lab.components]\nparts = their_parts\n")
        (tmp_path / "site" / "their_parts.py").write_text(text)
        config._load_installed.cache_clear()

    yield install
    sys.modules.pop("their_parts", None)
    config._load_installed.cache_clear()


def test_an_installed_package_offers_components(
    gpt2lab: Call, installed: Callable[[str], None], ablation: Path
) -> None:
    installed(SINE.replace('"sine"', '"theirs"'))
    ablation.write_text(ablation.read_text().replace("{model.position: rotary}", "{model.mlp: theirs}"))
    assert gpt2lab("check", ablation).code == 0
    names = [one["name"] for one in json.loads(gpt2lab("components", "mlp", "--json").out)["slots"]["mlp"]]
    assert names[-1] == "theirs"
    assert "One hidden layer bent by a sine" in gpt2lab("explain", "mlp=theirs").out


def test_an_installed_package_that_breaks_is_named(gpt2lab: Call, installed: Callable[[str], None]) -> None:
    installed("import no_such_module\n")
    answer = gpt2lab("components")
    assert answer.code == 2
    assert answer.err == (
        "gpt2lab: error [CONFIG] entry point parts (their_parts): plug-in failed to load: "
        "ModuleNotFoundError(\"No module named 'no_such_module'\")\ntry: pip show their-parts\n"
    )
