"""What people see: help, answers, and errors that say where, what, and what next."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer.main
from servers import free_ports

from gpt2lab.cli import catalogue
from gpt2lab.cli.kept import kept
from gpt2lab.planning import ablation as planning
from gpt2lab.store import Store, write_json

REPOSITORY = Path(__file__).parents[2]
POSENC = REPOSITORY / "ablations/posenc.yaml"
Call = Callable[..., Any]

ERROR = re.compile(r"(gpt2lab: error \[[A-Z]+\] \S.*\n)+try: \S.*\n")


def python(script: str, *, stdout: int = subprocess.PIPE, cwd: Path | None = None) -> subprocess.Popen[str]:
    """A process of its own."""
    command = [sys.executable, "-c", script]
    return subprocess.Popen(command, stdout=stdout, stderr=subprocess.PIPE, text=True, cwd=cwd)


# Help.


def test_help_answers_without_heavy_modules() -> None:
    heavy = ("torch", "mlflow", "pandas", "numpy", "scipy", "matplotlib", "pydantic", "yaml", "jinja2", "rich.table")
    script = (
        "import sys; sys.argv = ['gpt2lab', '--help']\nfrom gpt2lab.cli import main\n"
        f"try: main()\nexcept SystemExit as end: print(end.code, [m for m in {heavy} if m in sys.modules])"
    )
    out, err = python(script).communicate()
    assert out.splitlines()[-1] == "0 []" and err == ""
    assert "run " in out and "components " in out and "--debug" in out


@pytest.mark.parametrize(
    ("line", "heavy"),
    [
        (["noise", "--runs", "."], ("torch", "matplotlib", "scipy.special", "pandas", "mlflow", "optuna")),
        (["check", "posenc", "--scale", "nano"], ("matplotlib", "scipy.special", "pandas", "mlflow", "optuna")),
    ],
    ids=["noise", "check"],
)
def test_commands_import_only_what_they_need(line: list[str], heavy: tuple[str, ...], tmp_path: Path) -> None:
    script = (
        f"import sys; sys.argv = ['gpt2lab', *{line}]\nfrom gpt2lab.cli import main\n"
        f"try: main()\nexcept SystemExit as end: print(end.code, [m for m in {heavy} if m in sys.modules])"
    )
    out, err = python(script, cwd=tmp_path).communicate()
    assert out.splitlines()[-1] == "0 []" and err == ""


@pytest.fixture
def code_sum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sum of the code, first in a list, where only gpt2lab's own components are registered."""
    sums = ["as it is"]
    monkeypatch.setenv("GPT2LAB_DATA", str(tmp_path / "data"))
    monkeypatch.setattr("gpt2lab.cli.kept.sum_of_code", lambda: sums[0])
    monkeypatch.setattr("gpt2lab.cli.kept.PLUGINS", [])  # of tests before this one
    for slot in catalogue.all_slots(None).values():  # what those left there
        own = {name: c for name, c in slot._components.items() if c.factory.__module__.startswith("gpt2lab.")}
        monkeypatch.setattr(slot, "_components", own)
    return sums


def test_components_are_listed_from_the_cache_only_while_the_code_is_the_same(
    gpt2lab: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code_sum: list[str]
) -> None:
    imports: list[Any] = []
    all_slots = catalogue.all_slots
    monkeypatch.setattr(catalogue, "all_slots", lambda plugin: imports.append(plugin) or all_slots(plugin))
    (tmp_path / "mine.py").write_text("")
    first, as_json = gpt2lab("components").out, gpt2lab("components", "--json").out
    assert "* learned" in first and "rotary" in [one["name"] for one in json.loads(as_json)["slots"]["position"]]
    assert (gpt2lab("components").out, gpt2lab("components", "--json").out) == (first, as_json)
    assert len(imports) == 1
    for change in (lambda: code_sum.insert(0, "edited"), lambda: code_sum.insert(0, ""), lambda: None):
        change()
        assert gpt2lab("components").out == first
    assert len(imports) == 4
    code_sum[0] = "as it is"
    assert gpt2lab("components", "--plugin", "mine.py").code == 0 and imports[-1] == ["mine.py"]


def test_an_answer_is_not_given_again_once_a_file_exists_that_was_looked_for(
    tmp_path: Path, code_sum: list[str]
) -> None:
    asked: list[str] = []

    def answer() -> str:
        try:
            asked.append((tmp_path / "maybe").read_text())
        except FileNotFoundError:
            asked.append("absent")
        return asked[-1]

    assert [kept("tests", None, answer) for _ in range(2)] == ["absent", "absent"] and len(asked) == 1
    (tmp_path / "maybe").write_text("here")
    assert [kept("tests", None, answer) for _ in range(2)] == ["here", "here"] and len(asked) == 2


def test_a_sound_file_is_checked_again_once_anything_that_it_rests_on_changes(
    gpt2lab: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code_sum: list[str]
) -> None:
    checks: list[Any] = []
    load_ablation = planning.load_ablation
    monkeypatch.setattr(planning, "load_ablation", lambda *a, **k: checks.append(a) or load_ablation(*a, **k))
    (tmp_path / "base.yaml").write_text("extends: nano\n")
    (tmp_path / "mine.py").write_text("")
    file = tmp_path / "norms.yaml"
    text = "{ablation: norms, question: Which?, base: base.yaml, baseline: a, arms: {a: {}, b: {model.norm: rmsnorm}}}"
    file.write_text(text)

    def asked(*words: str) -> tuple[int, int]:
        """Exit code, and how often the file was really checked."""
        before = len(checks)
        return gpt2lab("check", "norms.yaml", *words).code, len(checks) - before

    assert [asked(), asked(), asked("--json")] == [(0, 1), (0, 0), (0, 0)]
    assert [asked("--seeds", "5"), asked("--set", "optim.lr=0.1"), asked("--plugin", "mine.py")] == [(0, 1)] * 3
    assert [asked("--plugin", "mine.py"), asked()] == [(0, 1), (0, 0)]
    code_sum.insert(0, "edited")
    assert [asked(), asked()] == [(0, 1), (0, 0)]
    (tmp_path / "base.yaml").write_text("extends: nano\noptim: {lr: 0.1}\n")
    assert [asked(), asked()] == [(0, 1), (0, 0)]
    (tmp_path / "base.yaml").write_text("extends: nano\noptim: {lr: fast}\n")
    assert [asked(), asked()] == [(2, 1), (2, 1)]
    (tmp_path / "base.yaml").unlink()
    assert [asked(), asked()] == [(2, 1), (2, 1)]
    (tmp_path / "base.yaml").write_text("extends: nano\n")
    file.write_text(text.replace("rmsnorm", "rmsnrm"))
    assert [asked(), asked()] == [(2, 1), (2, 1)]


def commands(group: Any = None, path: str = "gpt2lab") -> dict[str, Any]:
    """Every command, by what one types."""
    from gpt2lab.cli import app

    found = {}
    group = group or typer.main.get_command(app)
    for name, command in group.commands.items():
        found[f"{path} {name}"] = command
        if hasattr(command, "commands"):
            found |= commands(command, f"{path} {name}")
    return found


def test_every_command_and_option_says_what_it_does(gpt2lab: Call) -> None:
    for path, command in commands().items():
        assert command.help and command.help.strip().endswith("."), path
        for parameter in command.params:
            assert getattr(parameter, "help", None), f"{path} {parameter.name}"
    for group in ((), ("data",)):
        listed = re.split("(?:Commands|Studies):", gpt2lab(*group, "--help").out)[1]
        lines = [line for line in listed.splitlines() if line.startswith("  ") and "--debug" not in line]
        assert len(lines) == len([p for p in commands() if p.count(" ") == len(group) + 1 and " ".join(group) in p])
        assert all(re.fullmatch(r"  [a-z-]+ +[A-Z].*\.", line) and "..." not in line for line in lines)


def test_a_group_without_a_command_shows_its_help(gpt2lab: Call) -> None:
    for words in ((), ("data",)):
        answer = gpt2lab(*words)
        assert answer.code == 0 and re.match(r"(?s)Usage: gpt2lab.*(Commands|Studies):", answer.out)


# Errors.

USAGE = {
    "unknown command": (["componens"], r"gpt2lab: no such command 'componens'\. Did you mean 'components'"),
    "unknown command of a group": (["data", "lst"], r"gpt2lab data: no such command 'lst'\. Did you mean 'list'\?"),
    "unknown option": (["run", "x", "--seed", "3"], r"gpt2lab run: no such option: --seed .*--seeds"),
    "missing argument": (["run"], "gpt2lab run: missing argument 'FILE'"),
    "no number": (["run", "x", "--seeds", "few"], "gpt2lab run: invalid value for '--seeds'"),
    "no seeds": (["run", "x", "--seeds", "0"], "gpt2lab run: invalid value for '--seeds'.*number from 1 on nor auto"),
    "no time": (["run", "x", "--budget", "6"], "gpt2lab run: invalid value for '--budget'.*no time"),
    "no jobs": (["run", "x", "--jobs", "-1"], "gpt2lab run: invalid value for '--jobs'"),
    "no port": (["ui", "--port", "70000"], "gpt2lab ui: invalid value for '--port'"),
    "a file for the store": (["runs", "--runs", "a file"], "gpt2lab runs: invalid value for '--runs': .*is a file"),
    "a file for reports": (["report", "x", "--out", "a file"], "gpt2lab report: invalid value for '--out'"),
    "a setting without --set": (["train", "nano", "optim.lr=2e-3", "--dry-run"], r"gpt2lab train: got .* \(optim"),
    "missing option": (["compare", "x.csv", "-b", "a"], "gpt2lab compare: missing option '--smallest-effect'"),
}
CONFIG: dict[str, tuple[list[Any], str]] = {
    "missing file": (["run", "none.yaml"], "none.yaml: no such file"),
    "a folder": (["check", "."], r"\.: a folder, not a YAML file"),
    "malformed YAML": (["check", "broken.yaml"], "broken.yaml:3: not valid YAML: "),
    "a list": (["check", "list.yaml"], "list.yaml: a list at its root"),
    "unknown arm": (["check", POSENC, "--arms", "learned,rotry"], "--arms: unknown arm 'rotry'; did you mean 'rotary'"),
    "no baseline": (["check", POSENC, "--arms", "rotary"], "--arms: must keep the baseline 'learned'"),
    "unknown preset": (["check", POSENC, "--scale", "nanoo"], "--scale: unknown preset 'nanoo'; did you mean 'nano'"),
    "--set without =": (["check", POSENC, "--set", "model.n_layer"], "--set model.n_layer: write key=value"),
    "--set of an unknown key": (
        ["check", POSENC, "--set", "model.nlayer=2"], "--set model.nlayer: unknown key 'nlayer'; did you mean 'n_layer'"
    ),
    "--set of a bad value": (["check", POSENC, "--set", "model.n_layer=two"], "--set model.n_layer: 'two' does not"),
    "no such plug-in": (["check", POSENC, "--plugin", "none.py"], "none.py: no such plug-in file"),
    "too many seeds": (["check", POSENC, "--seeds", "101"], "--seeds: from 1 to 100 seeds are expected"),
    "a shipped file by another name": (["run", "posenc.yml"], "posenc.yml: no such file; did you mean 'posenc', which"),
    "a slot to explain": (["explain", "mlp"], "'mlp' is a slot, not a component\ntry: gpt2lab components mlp"),
    "a setting to explain": (["explain", "lr"], "'lr' is a setting, optim.lr, not a component\ntry: gpt2lab schema"),
    "unknown slot": (["components", "mpl"], "unknown slot 'mpl'; did you mean 'mlp'"),
    "unknown slot to explain": (["explain", "nrm=rmsnorm"], "unknown slot 'nrm'; did you mean 'norm'"),
    "no SLOT=NAME": (["explain", "rmsnrom"], "'rmsnrom' is not SLOT=NAME, nor a component; did you mean 'rmsnorm'?"),
    "name of several slots": (["explain", "plain"], "embedding, linear, scores have a component plain"),
    "unknown component": (["explain", "norm=rmsnrom"], "norm=rmsnrom: unknown norm 'rmsnrom'; did you mean 'rmsnorm'"),
    "unknown option": (["explain", "mlp=moe,expert=4"], "mlp=moe,expert=4: unknown option of mlp moe"),
    "bad option": (["explain", "mlp=moe,experts=1"], "mlp=moe,experts=1: '1' does not fit: it must be at least 2"),
    "unknown study": (["report", "posence"], "unknown study or sweep 'posence'; did you mean 'posenc"),
    "unknown study to sync": (["sync", "nosuch"], "unknown study or sweep 'nosuch'"),
    "unknown run": (["show", "zzz"], r"unknown run 'zzz' \(known: "),
    "a study for a run": (
        ["show", "posenc@nano"], "'posenc@nano' is a study, not a run; .*\ntry: gpt2lab report posenc@nano"
    ),
    "a study to sample": (["sample", "posenc@nano"], "'posenc@nano' is a study, not a run"),
    "several runs": (["show", ""], "'' begins 9 run ids"),
    "unknown preset to prepare": (["data", "prepare", "nanoo"], "unknown preset 'nanoo'; did you mean 'nano'"),
    "no plug-in to test": (["test-plugin", "none.py"], "none.py: no such plug-in file"),
    "no table": (["compare", "none.csv", "-b", "a", "-x", "1"], "none.csv: cannot be read: No such file"),
    "a folder for a table": (["compare", ".", "-b", "a", "-x", "1"], r"\.: nothing that TensorBoard, Weights & Biases"),
    "empty table": (["compare", "empty.csv", "-b", "a", "-x", "1"], "empty.csv: the table has no rows"),
    "no seeds in a table": (["compare", "noseed.csv", "-b", "a", "-x", "1"], "noseed.csv: unknown column 'run'"),
    "no number in a table": (["compare", "words.csv", "-b", "a", "-x", "1"], "words.csv:2: column 'value': a number"),
    "a decimal comma": (["compare", "comma.csv", "-b", "a", "-x", "1"], "comma.csv:2: more cells than columns"),
    "not a table": (["compare", "bytes.csv", "-b", "a", "-x", "1"], "bytes.csv: not a CSV file in UTF-8"),
    "one run twice": (["compare", "twice.csv", "-b", "a", "-x", "1"], "twice.csv:3: arm 'a' has seed 0 already"),
    "unknown baseline": (["compare", "good.csv", "-b", "aa", "-x", "1"], "unknown baseline 'aa'; did you mean 'a'"),
    "unknown metric": (["compare", "good.csv", "-b", "a", "-x", "1", "--metric", "m"], "good.csv: unknown column 'm'"),
    "no effect": (["compare", "good.csv", "-b", "a", "-x", "nan"], "smallest_effect: a positive difference is"),
}  # fmt: skip
FILES = {
    "a file": b"",
    "broken.yaml": b"ablation: x\narms: {a: {}\nbaseline: a\n",
    "list.yaml": b"- a\n- b\n",
    "empty.csv": b"arm,seed,value\n",
    "noseed.csv": b"arm,value\na,1\n",
    "words.csv": b"arm,seed,value\na,0,low\n",
    "comma.csv": b"arm,seed,value\na,0,2,15\n",
    "bytes.csv": b"\xff\xfe\x00",
    "twice.csv": b"arm,seed,value\na,0,1\na,0,2\n",
    "good.csv": b"arm,seed,value\na,0,1\na,1,2\nb,0,3\nb,1,4\n",
}


@pytest.fixture
def files(tmp_path: Path, store: Path) -> None:
    """Files that cannot be used, and a store."""
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("case", USAGE)
def test_a_command_line_that_means_nothing(case: str, gpt2lab: Call) -> None:
    words, said = USAGE[case]
    answer = gpt2lab(*words)
    assert answer.code == 2 and answer.out == ""
    assert ERROR.fullmatch(answer.err)
    assert re.match(rf"gpt2lab: error \[USAGE\] {said}", answer.err)
    hint = answer.err.splitlines()[-1].removeprefix("try: gpt2lab ").split()
    assert gpt2lab(*hint).code == 0


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("case", CONFIG)
def test_an_error_says_where_what_and_what_next(case: str, gpt2lab: Call) -> None:
    words, said = CONFIG[case]
    answer = gpt2lab(*words)
    assert answer.code == 2 and answer.out == ""
    assert ERROR.fullmatch(answer.err), answer.err
    assert re.search(rf"^gpt2lab: error \[CONFIG\] {said}", answer.err), answer.err


@pytest.mark.usefixtures("files")
def test_hints_are_what_one_types(gpt2lab: Call) -> None:
    assert gpt2lab("compare", "good.csv", "-b", "aa", "-x", "1").err.endswith("try: --baseline 'a'\n")


def test_everything_wrong_with_a_file_is_said_at_once(gpt2lab: Call, ablation: Path) -> None:
    ablation.write_text(
        ablation.read_text().replace("{model.position: rotary}", "{model.positon: rotary, optim.lr: fast}")
        + "alpha: 2\nexpected: {rotry: better}\n"
    )
    answer = gpt2lab("check", ablation, "--arms", "learned,nope")
    told = answer.err.splitlines()
    assert answer.code == 2 and ERROR.fullmatch(answer.err)
    answer = gpt2lab("check", ablation)
    told += answer.err.splitlines()
    for part in (
        "unknown arm 'nope'", "positon'; did you mean 'position'", "'fast' does not fit", "alpha: '2' does not fit",
        "unknown arm 'rotry'; did you mean 'rotary'",
    ):  # fmt: skip
        assert any(part in line for line in told), (part, told)
    assert answer.err.count("gpt2lab: error [CONFIG]") == 4


@pytest.mark.usefixtures("no_plugins_after")
def test_check_is_content_with_every_shipped_ablation(gpt2lab: Call) -> None:
    for file in sorted((REPOSITORY / "ablations").glob("*.yaml")):
        plugin = file.with_suffix(".py")
        answer = gpt2lab("check", file, "--scale", "nano", *(("--plugin", plugin) if plugin.exists() else ()))
        assert answer.code == 0 and "no mistakes" in answer.out and "at nano" in answer.out


def test_what_a_user_wrote_cannot_control_the_terminal(gpt2lab: Call) -> None:
    answer = gpt2lab("components", "\x1b[31mred\nline")
    assert answer.code == 2 and "\x1b" not in answer.err and ERROR.fullmatch(answer.err)
    answer = gpt2lab("\x1b[31mred\nline")
    assert answer.code == 2 and "\x1b" not in answer.err and ERROR.fullmatch(answer.err)


def test_damaged_data_and_machines_have_codes_of_their_own(gpt2lab: Call, store: Path) -> None:
    damaged = Store(store).runs()[0]
    damaged.metrics.write_bytes(b"{\n" + damaged.metrics.read_bytes())
    answer = gpt2lab("runs")
    assert answer.code == 4 and answer.out.count("  finished  ") == 8
    assert re.search(rf"^{damaged.id}  damaged ", answer.out, re.M)
    line = rf"^{damaged.id}: runs/{damaged.id}/metrics.jsonl: line 1 is damaged \(try: mv .*\)$"
    assert re.search(line, answer.out, re.M)


def test_a_bug_is_one_line_and_the_name_of_a_file(
    gpt2lab: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(self: object) -> None:
        raise RuntimeError("boom\nand more")

    monkeypatch.setattr(Store, "runs", broken)
    (tmp_path / "runs").mkdir()
    traces = tmp_path / "state-home" / "gpt2lab" / "traces"
    for count in range(25):
        traces.mkdir(parents=True, exist_ok=True)
        (traces / f"{count}.log").touch()
    answer = gpt2lab("runs")
    assert answer.code == 1 and answer.out == ""
    first, second = answer.err.splitlines()
    assert first == r"gpt2lab: error [INTERNAL] RuntimeError: boom\nand more"
    file = Path(second.rpartition(" ")[2])
    assert file.parent == traces and len(list(traces.iterdir())) == 20
    assert "Traceback (most recent call last)" in file.read_text()
    assert 'raise RuntimeError("boom' in file.read_text()
    answer = gpt2lab("runs", "--debug")
    assert answer.code == 1 and 'raise RuntimeError("boom' in answer.err


def test_what_the_system_refuses_is_no_bug(gpt2lab: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = gpt2lab("runs", "--runs", "x" * 300)
    assert answer.code == 3 and re.match(r"gpt2lab: error \[ENVIRONMENT\] x+\S*: File name too long\ntry: ", answer.err)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "runs").mkdir()
    monkeypatch.setattr(Store, "runs", lambda _: (tmp_path / "loop").resolve(strict=True))
    assert gpt2lab("runs").code == 3
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    answer = gpt2lab("runs")
    assert answer.code == 3 and "the current folder: No such file or directory\ntry: cd " in answer.err


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried ..."),
        RuntimeError("can't start new thread"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_limit_of_memory_is_no_bug(
    gpt2lab: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    (tmp_path / "runs").mkdir()

    def refused(self: object) -> None:
        try:
            raise error
        except Exception as cause:
            raise RuntimeError("a library's own words") from cause

    monkeypatch.setattr(Store, "runs", refused)
    answer = gpt2lab("runs")
    assert answer.code == 3 and re.search(r"error \[ENVIRONMENT\] .*: out of memory.*\ntry: ulimit -v", answer.err)


def test_debug_shows_the_trace_of_a_users_error(gpt2lab: Call) -> None:
    answer = gpt2lab("components", "--debug", "mpl")
    assert answer.code == 2 and "Traceback (most recent call last)" in answer.err
    assert answer.err.splitlines()[-1] == "try: gpt2lab components"
    assert "Traceback" not in gpt2lab("components", "mpl").err


def test_an_interrupt_is_one_line(gpt2lab: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Store, "runs", interrupted)
    (tmp_path / "runs").mkdir()
    answer = gpt2lab("runs")
    assert (answer.code, answer.out) == (130, "") and answer.err.startswith("gpt2lab: error [INTERRUPTED] ")
    assert "try: the same command" in answer.err and "Traceback" not in answer.err


@pytest.mark.parametrize("runs", [1, 400])
def test_a_reader_that_goes_away_is_no_error(runs: int, tmp_path: Path) -> None:
    """Whether all fits into the buffer, and the pipe breaks at the end, or not."""
    for number in range(runs):
        (tmp_path / "runs" / f"{number:016x}").mkdir(parents=True)
    script = "import sys; sys.argv = ['gpt2lab', 'runs', '--json']\nfrom gpt2lab.cli import main\nmain()"
    read, write = os.pipe()
    os.close(read)
    with python(script, stdout=write, cwd=tmp_path) as process:
        os.close(write)
        assert process.communicate()[1] == ""
    assert process.returncode in (1, 141)


# Components.


def test_an_option_is_explained_by_its_places(gpt2lab: Call) -> None:
    said = gpt2lab("explain", "qk_norm").out
    assert 'yaml:  model.scores: {"name": "plain", "qk_norm": true}' in said and "(+3,072 against canonical)" in said
    assert "normalise the queries and keys of each head (with the model's norm) before positions rotate them." in said
    record = json.loads(gpt2lab("explain", "experts", "--json").out)
    assert record["option"] == "experts" and record["of"][0] | {"doc": "", "cost": []} == {
        "slot": "mlp", "key": "model.mlp", "component": "moe", "type": "int", "default": 8, "doc": "", "cost": [],
        "value": {"name": "moe", "experts": 4, "top_k": 1},
    }  # fmt: skip
    assert "also:    top_k is an option of mlp=moe" in gpt2lab("explain", "top_k").out


def test_every_option_of_the_registry_can_be_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "cost_lines", lambda choice: [])
    slots = catalogue.all_slots(None)
    for name in {name for slot in slots.values() for component in slot for name in component.parameters}:
        explained = catalogue.option_explanation(name, catalogue.option_places(name, slots))
        for place in explained["record"]["of"]:
            if "value" in place:
                assert name in slots[place["slot"]].read(place["value"]).options


def test_a_metric_is_explained_by_how_it_is_used(gpt2lab: Call) -> None:
    answer = gpt2lab("explain", "metric=calibration,bins=10")
    assert answer.code == 0 and "use:     gpt2lab eval --study NAME --metric calibration,bins=10" in answer.out
    assert "yaml:" not in answer.out and "cost:" not in answer.out


def test_components_as_json_map_slots_to_components(gpt2lab: Call) -> None:
    from gpt2lab.registry import BESIDE_CONFIG, SLOTS

    answer = gpt2lab("components", "--json")
    found = json.loads(answer.out)["slots"]
    assert answer.code == 0
    assert {slot: [one["name"] for one in ones] for slot, ones in found.items()} == {
        name: slot.names() for name, slot in {**SLOTS, **BESIDE_CONFIG}.items()
    }
    moe = next(one for one in found["mlp"] if one["name"] == "moe")
    assert moe["options"]["experts"] == {"type": "int", "default": 8}
    assert moe["source"] and moe["summary"] and moe["file"] == "mlp.py"
    alibi = next(one for one in found["position"] if one["name"] == "alibi")
    assert alibi["needs"] == {"attention": "bias"}
    assert list(json.loads(gpt2lab("components", "norm", "--json").out)["slots"]) == ["norm"]


def test_components_are_listed_with_the_canonical_ones_marked(gpt2lab: Call) -> None:
    answer = gpt2lab("components", "mlp")
    marked = [line.split()[1] for line in answer.out.splitlines() if line.startswith("*")]
    others = [line.split()[0] for line in answer.out.splitlines() if re.match("  [a-z]", line)]
    assert answer.code == 0 and "model.mlp: the feed-forward network of a block" in answer.out
    assert marked == ["gelu_tanh"] and {"gelu", "relu2", "swiglu", "moe"} <= set(others)
    everything = gpt2lab("components").out
    assert re.search(r"^\* cross_entropy", everything, re.M) and re.search("^  value_residual", everything, re.M)
    assert "data.corpus: " in everything and "optim.schedule: " in everything


def test_the_matrix_lists_pairs_that_a_config_may_not_have(gpt2lab: Call) -> None:
    found = json.loads(gpt2lab("components", "--matrix", "--json").out)
    pairs = {frozenset([pair["one"], pair["other"]]): pair["why"] for pair in found["refused"]}
    assert "needs 'value'" in pairs[frozenset(["attention=mla", "stack=value_residual"])]
    assert "averages already" in pairs[frozenset(["averaging=ema", "optimizer=schedule_free"])]
    assert frozenset(["attention=gqa", "stack=value_residual"]) not in pairs
    assert found["pairs"] > 5000
    words = gpt2lab("components", "stack", "--matrix").out
    assert "attention=mla" in words and "averaging" not in words


def test_json_schemas_have_every_component_with_its_options() -> None:
    from gpt2lab.cli.catalogue import all_slots
    from gpt2lab.registry import SLOTS

    all_slots(None)  # fills them
    for slot in SLOTS.values():
        bare, *mappings = json.loads(json.dumps(slot.json_schema()))["anyOf"]
        mappings = [mapping for mapping in mappings if mapping["type"] == "object"]
        assert [mapping["properties"]["name"]["const"] for mapping in mappings] == slot.names()
        assert bare["enum"] == [c.name for c in slot if len(c.defaults()) == len(c.parameters)]
        for mapping, component in zip(mappings, slot, strict=True):
            assert set(mapping["properties"]) == {"name", *component.parameters}
    moe = next(m for m in SLOTS["mlp"].json_schema()["anyOf"][1:] if m.get("properties", {})["name"]["const"] == "moe")
    assert moe["properties"]["experts"] == {"type": "integer", "minimum": 2, "default": 8}
    assert (moe["required"], moe["additionalProperties"]) == (["name"], False)
    assert SLOTS["mlp"].json_schema()["anyOf"][-1]["type"] == "array"
    assert "array" not in [kind.get("type") for kind in SLOTS["head"].json_schema()["anyOf"]]


@pytest.mark.parametrize("most", [1, pytest.param(None, marks=pytest.mark.slow)], ids=["the first", "all"])
def test_every_component_can_be_explained(gpt2lab: Call, monkeypatch: pytest.MonkeyPatch, most: int | None) -> None:
    from gpt2lab.cli.catalogue import all_slots, canonical_costs
    from gpt2lab.inspection import costs
    from gpt2lab.registry import SLOTS

    small = {"n_layer": 1, "block_size": 64, "vocab_size": 512}  # to save time
    for name in ("costs", "cache_numbers"):
        full = getattr(costs, name)
        monkeypatch.setattr(costs, name, lambda config, full=full: full(config.model_copy(update=small)))
    all_slots(None)
    canonical_costs.cache_clear()
    try:
        for slot in SLOTS.values():
            for component in list(slot)[:most]:
                answer = gpt2lab("explain", f"{slot.name}={component.name}")
                assert answer.code == 0 and answer.err == ""
                head, _, rest = answer.out.partition("\n")
                assert head == f"{slot.path} = {component.name}"
                assert rest.strip().startswith(component.doc)
                assert f"source:  {component.source}\n" in answer.out
                assert f"yaml:    {slot.path}: " in answer.out
                assert all(f"\n  {option}: " in answer.out for option in component.parameters)
                in_model = slot.path.startswith("model.")
                assert answer.out.count("cost:    ") == (0 if not in_model else 4 if component.name == "moe" else 3)
                assert ("; canonical GPT-2: " in answer.out) == in_model
    finally:
        canonical_costs.cache_clear()


def test_an_explanation_counts_what_124m_costs(gpt2lab: Call) -> None:
    learned = gpt2lab("explain", "position=learned").out
    assert "cost:    124,439,808 parameters at gpt2-124m (+0 against canonical)" in learned
    experts = gpt2lab("explain", "mlp=moe,experts=2,top_k=1").out
    assert 'yaml:    model.mlp: {"name": "moe", "experts": 2, "top_k": 1}' in experts
    assert re.search(r"cost:    181,[\d,]+ parameters at gpt2-124m \(\+56,\d+,\d+ against canonical\)", experts)
    assert re.search(r"cost:    124,[\d,]+ parameters work on one token", experts)
    assert "cost:    36,864 bytes of cache per token in half precision (+0)" in learned  # 2 x 12 x 768 numbers
    assert "cost:    3,072 bytes of cache per token in half precision (-33,792)" in gpt2lab("explain", "mqa").out
    assert "effect:  rotary against learned: better (2.759 against 2.809 nats)" in gpt2lab("explain", "rotary").out
    assert "needs:   attention that offers bias" in gpt2lab("explain", "position=alibi").out
    assert "offers:  bias, rotate, value" in gpt2lab("explain", "attention=mha").out


# Plans.


def test_a_dry_run_tells_what_would_be_done(gpt2lab: Call, text: Path, tmp_path: Path) -> None:
    words = ["run", POSENC, "--scale", "nano", "--arms", "learned,rotary", "--jobs", "1", "--dry-run"]
    settings = [f"data.corpus={{name: text, paths: [{text}]}}", "evaluation.tokens=256", "data.validation_fraction=0.1"]
    words += [word for setting in settings for word in ("--set", setting)]
    answer = gpt2lab(*words, "--json")
    plan = json.loads(answer.out)
    assert answer.code == 0 and plan["study"] == "posenc@nano"
    learned, rotary = plan["arms"]
    assert (learned["arm"], learned["changes"], learned["parameters"]) == ("learned", {}, 842_496)
    assert (rotary["arm"], rotary["changes"]) == ("rotary", {"model.position": "rotary"})
    assert rotary["parameters"] == 842_496 - 128 * 128
    for arm in plan["arms"]:
        assert arm["tokens"] == 800 * 1024
        assert arm["flops"] == arm["flops_per_token"] * arm["tokens"] > 1e12
        assert list(arm["runs"]) == ["0", "1", "2"] and arm["finished"] == []
        assert arm["seconds_per_run"] > 0 and arm["memory_bytes"] > 1e6
    assert len({run for arm in plan["arms"] for run in arm["runs"].values()}) == 6
    assert plan["seconds"] == pytest.approx(3 * sum(arm["seconds_per_run"] for arm in plan["arms"]))
    assert (plan["jobs"], plan["threads"], plan["device"]) == (1, 1, "cpu")
    shown = gpt2lab(*words).out
    assert "842,496" in shown and "6 runs, 0 finished; about " in shown and "model.position = rotary" in shown
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_refuses_what_does_not_fit_the_data(gpt2lab: Call, ablation: Path) -> None:
    answer = gpt2lab("run", ablation, "--dry-run", "--set", "evaluation.tokens=100000")
    assert answer.code == 2 and ERROR.search(answer.err)
    assert "[CONFIG] arm learned: evaluation.tokens: the validation split needs 100001 tokens" in answer.err
    fits = answer.err.splitlines()[-1].removeprefix("try: --set ")
    assert gpt2lab("run", ablation, "--dry-run", "--set", fits).code == 0
    answer = gpt2lab("run", ablation, "--dry-run", "--jobs", "9999")
    assert answer.code == 2 and "--jobs: 9999 jobs of 1 threads" in answer.err


# Data.


def test_data_is_prepared_listed_and_checked(gpt2lab: Call, ablation: Path, tmp_path: Path) -> None:
    assert "nothing is prepared yet" in gpt2lab("data", "list").out
    assert "nothing is prepared yet" in gpt2lab("data", "check").out
    assert json.loads(gpt2lab("data", "list", "--json").out)["data"] == []
    answer = gpt2lab("data", "prepare", "./preset.yaml")
    size = (tmp_path / "text.txt").stat().st_size
    train, validation = (int(n.replace(",", "")) for n in re.findall(r"([\d,]+) (?:training|validation)", answer.out))
    assert answer.code == 0 and train + validation == size and train > 3 * validation > 0
    [one] = json.loads(gpt2lab("data", "list", "--json").out)["data"]
    assert (one["corpus"], one["tokenizer"], one["train"], one["usable"]) == ("text", "bytes", train, True)
    assert f"text (bytes): {train:,} + {validation:,} tokens" in gpt2lab("data", "list").out
    assert gpt2lab("data", "prepare", "./preset.yaml").out == answer.out
    assert gpt2lab("data", "prepare", "./preset.yaml", "--set", "data.validation_fraction=0.3").code == 0
    whole = gpt2lab("data", "check")
    assert whole.code == 0 and whole.out.count(": whole") == 2


def test_damaged_data_is_told_and_the_rest_is_checked(gpt2lab: Call, ablation: Path) -> None:
    for fraction in ("0.1", "0.2", "0.3"):
        gpt2lab("data", "prepare", "./preset.yaml", "--set", f"data.validation_fraction={fraction}")
    first, second, _ = (Path(one["path"]) for one in json.loads(gpt2lab("data", "list", "--json").out)["data"])
    shard = first / "train_000.bin"
    shard.write_bytes(b"??" + shard.read_bytes()[2:])
    (second / "manifest.json").write_text("{")
    answer = gpt2lab("data", "check")
    assert answer.code == 4 and answer.out.count(": whole") == 1
    said = answer.err[answer.err.index("gpt2lab: error") :]
    assert ERROR.fullmatch(said) and said.count("[DATA]") == 2
    assert f"{shard}: damaged: its sha256 is " in said and f"{second}" in said
    assert f"{second}  unusable: " in gpt2lab("data", "list").out
    assert [one["usable"] for one in json.loads(gpt2lab("data", "list", "--json").out)["data"]] == [True, False, True]


# Results.


def test_compare_gives_verdict_words(gpt2lab: Call, tmp_path: Path) -> None:
    means = {"learned": 2.15, "rotary": 1.89, "none": 2.15, "post": 2.95, "few": 2.0}
    table = "arm,seed,value\n"
    for arm, mean in means.items():
        noise = -0.001 if arm == "none" else 0.001
        table += "".join(f"{arm},{s},{mean + noise * (s - 2)}\n" for s in range(1 if arm == "few" else 5))
    (tmp_path / "results.csv").write_text(table)
    answer = gpt2lab("compare", "results.csv", "--baseline", "learned", "--smallest-effect", "0.05")
    *lines, last = answer.out.splitlines()
    verdicts = dict(line.split(" against learned: ") for line in lines)
    assert last == "read as: value, lower is better, unit nats"
    assert answer.code == 0 and verdicts.keys() == means.keys() - {"learned"}
    assert verdicts["rotary"].startswith("better, -0.2600 nats [")
    assert verdicts["none"].startswith("no difference larger than 0.05, ")
    assert verdicts["post"].startswith("worse, +0.8000 nats [")
    assert not verdicts["few"].startswith(("better", "worse", "no difference"))
    told = json.loads(gpt2lab("compare", "results.csv", "-b", "learned", "-x", "0.05", "--json").out)
    assert [c["arm"] for c in told["contrasts"]] == ["rotary", "none", "post", "few"]
    assert told["contrasts"][0]["verdict"] == verdicts["rotary"]


def test_runs_are_listed_with_the_studies_that_use_them(gpt2lab: Call, store: Path) -> None:
    failed, diverged = (Store(store).run(digit * 16) for digit in "12")
    failed.fail({"reason": "it broke", "phase": "training", "step": 3, "at": "now"})
    diverged.metrics.parent.mkdir()
    diverged.metrics.write_text('{"step": 5, "tokens": 5, "seconds": 1, "metrics": {"val/loss": NaN}}\n')
    answer = gpt2lab("runs")
    assert answer.code == 0 and answer.out.endswith("11 runs, 1 study in runs\n")
    lines = [" ".join(line.split()) for line in answer.out.splitlines()]
    assert lines[0] == "run status arm seed changes loss age study"
    row = re.compile(r"[0-9a-f]{16} finished \w+ \d (position=\w+ )?\d\.\d{4} \S+ (\w+ )?posenc@nano")
    assert sum(bool(row.fullmatch(line)) for line in lines) == 9
    assert any(line.startswith("1" * 16 + " failed 0 - - - -") for line in lines)
    rows = {row["id"]: row for row in json.loads(gpt2lab("runs", "--json").out, parse_constant=refuse)["runs"]}
    partial = {"id": "2" * 16, "status": "partial", "step": 5, "val_loss": None, "studies": [], "damage": None}
    assert partial.items() <= rows["2" * 16].items()
    assert sum(row["status"] == "finished" and math.isfinite(row["val_loss"]) for row in rows.values()) == 9
    for command in (("runs",), ("status",), ("studies",), ("show", "f"), ("clean", "--orphans")):
        answer = gpt2lab(*command, "--runs", "elsewhere")
        assert answer.code == 2 and "elsewhere: there is no such folder of runs" in answer.err


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


def test_show_tells_all_of_one_run(gpt2lab: Call, store: Path) -> None:
    run = Store(store).runs()[0]
    run.write_config("model: {n_layer: 4}\n")
    short = gpt2lab("show", run.id[:7])
    assert short.code == 0 and short.out.startswith(f"{run.id}: finished, ") and len(short.out.splitlines()) <= 10
    assert "used by   posenc@nano" in short.out and "▁" in short.out and f"files     runs/{run.id}\n" in short.out
    answer = gpt2lab("show", run.id[:7], "--full")
    assert answer.code == 0 and answer.out.startswith(short.out)
    assert f"\n# runs/{run.id}: finished\nmodel: {{n_layer: 4}}\n" in answer.out
    record = json.loads(answer.out.partition("\n\n")[2].partition("\n\n")[2])
    assert record["result"]["status"] == "finished" and record["failure"] is None
    assert len(record["evaluations"]) == 1 and record["run"]["id"] == run.id
    told = json.loads(gpt2lab("show", run.id, "--json").out)
    summary = told.pop("summary")
    assert summary["id"] == run.id and summary["study"] == "posenc@nano"
    assert told == {"id": run.id, "status": "finished", "config": "model: {n_layer: 4}\n", **record}


def test_report_writes_the_page_and_publishes_a_copy(gpt2lab: Call, store: Path, tmp_path: Path) -> None:
    answer = gpt2lab("report", "posenc", "--publish")
    assert answer.code == 0 and "rotary" in answer.out and "better" in answer.out
    written, published = tmp_path / "reports/posenc@nano", tmp_path / "reports/published/posenc@nano"
    assert (published / "index.html").read_bytes() == (written / "index.html").read_bytes()
    figures = {path.name for path in (published / "figures").iterdir()}
    (published / "figures" / "mine.svg").write_text("not of the report")
    (written / "figures" / "old.svg").write_text("of an earlier report")
    listed = json.loads((written / ".written.json").read_text())["files"]
    write_json(written / ".written.json", {"files": [*listed, "figures/old.svg", "../../../precious.txt"]})
    (tmp_path / "precious.txt").touch()
    assert gpt2lab("report", "posenc@nano", "--publish").code == 0
    assert {path.name for path in (published / "figures").iterdir()} == figures | {"mine.svg"}
    assert not (written / "figures" / "old.svg").exists() and (tmp_path / "precious.txt").exists()


def test_report_keeps_a_page_that_would_be_the_same_and_says_so(
    gpt2lab: Call, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpt2lab.reports.page.sum_of_code", lambda: "of the code")
    index = tmp_path / "reports/posenc@nano/index.html"
    answers, times = [], []
    for _ in range(2):
        answers.append(gpt2lab("report", "posenc").out)
        times.append(index.stat().st_mtime_ns)
    assert answers[1] == answers[0].rstrip() + " (unchanged)\n" and times[0] == times[1]
    assert gpt2lab("report", "posenc", "--images").out == answers[0]
    figures = {path.name for path in (index.parent / "figures").iterdir()}
    assert "differences.svg" in figures and {"differences.png", "differences.pdf"} <= figures
    assert gpt2lab("report", "posenc").out == answers[1]  # the page with its images is kept


def test_commands_that_only_read_the_store_start_without_torch(store: Path, tmp_path: Path) -> None:
    commands = ["report posenc", "ledger", "register posenc@nano", "studies", "runs", "status", "note posenc@nano"]
    code = (
        "import contextlib, sys\nimport gpt2lab.cli.serve\nfrom gpt2lab.cli import main\n"
        f"for command in {commands}:\n"
        "    sys.argv = ['gpt2lab', *command.split()]\n"
        "    with contextlib.suppress(SystemExit):\n        main()\n"
        "    if 'torch' in sys.modules: sys.exit(f'{command} imports torch')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("linked", ["posenc@nano", "posenc@nano/figures", "published/posenc@nano"])
def test_reports_leave_folders_alone_to_which_a_link_leads(
    gpt2lab: Call, store: Path, tmp_path: Path, linked: str
) -> None:
    outside, link = tmp_path / "outside", tmp_path / "reports" / linked
    outside.mkdir()
    (outside / "precious.svg").touch()
    link.parent.mkdir(parents=True)
    link.symlink_to(outside)
    answer = gpt2lab("report", "posenc", "--publish")
    assert answer.code == 2 and "is a symbolic link" in answer.err
    assert [path.name for path in outside.iterdir()] == ["precious.svg"]


# The user interface.


def test_a_port_in_use_is_said(gpt2lab: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "execve", lambda *_: None)  # it would take the place of this process
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        answer = gpt2lab("ui", "--port", str(port))
    assert answer.code == 3 and ERROR.fullmatch(answer.err)
    assert answer.err == (
        f"gpt2lab: error [ENVIRONMENT] 127.0.0.1:{port}: Address already in use\n"
        f"try: gpt2lab ui --port {port % 65535 + 1}\n"
    )


def test_the_user_interface_listens_to_this_machine_alone(
    gpt2lab: Call, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[tuple[list[str], dict[str, str]]] = []

    def run(program: str, words: list[str], environment: dict[str, str]) -> None:
        started.append((words, environment))

    monkeypatch.setattr(os, "execve", run)
    port = str(*free_ports(1))
    answer = gpt2lab("ui", "--port", port)
    assert answer.code == 0 and f"MLflow: http://127.0.0.1:{port}" in answer.out and "warning" not in answer.out
    [(words, environment)] = started
    assert words[words.index("--host") + 1] == "127.0.0.1" and words[words.index("--port") + 1] == port
    assert environment["MLFLOW_BACKEND_STORE_URI"].endswith(f"{store}/mlflow.db") and "mlflow.db" not in str(words)
    assert environment["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert "warning: MLflow has no password" in gpt2lab("ui", "--host", "0.0.0.0", "--port", port).out


def test_no_user_interface_is_started_over_a_store_that_cannot_be_written(
    gpt2lab: Call, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "execve", lambda *_: pytest.fail("nothing is to be started"))
    monkeypatch.setattr(os, "access", lambda _, mode: mode != os.W_OK)  # root can write wherever the disk lets it
    answer = gpt2lab("ui")
    assert answer.code == 3 and "cannot be written" in answer.err


def test_a_server_has_a_user_interface_of_its_own(gpt2lab: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "execve", lambda *_: pytest.fail("nothing is to be started"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@tracking.corp.com/mlflow")
    answer = gpt2lab("ui")
    assert answer.code == 0 and answer.out.startswith("MLflow: https://***@tracking.corp.com/mlflow\n")


def test_a_plan_for_another_machine_is_made_from_its_description(gpt2lab: Call, ablation: Path, tmp_path: Path) -> None:
    described = json.loads(gpt2lab("machine", "preset.yaml").out)
    there = {**described, "device": "cuda", "device_name": "a GPU", "torch": "9.9", "gpus": 4, "jobs": 4, "speed": 1e14}
    (tmp_path / "node.json").write_text(json.dumps(there))
    here, planned = (
        json.loads(gpt2lab("run", ablation, "--dry-run", "--json", *more).out)
        for more in ((), ("--machine", "node.json"))
    )
    assert planned["device"] == "cuda" and planned["jobs"] == 4 and planned["seconds"] < here["seconds"]
    ids = [[run for arm in plan["arms"] for run in arm["runs"].values()] for plan in (here, planned)]
    assert not set(ids[0]) & set(ids[1])  # another device and torch make other runs
    refused = gpt2lab("run", ablation, "--machine", "node.json")
    assert refused.code == 2 and "--dry-run" in refused.err
    for wrong in ([], {**there, "jobs": "4"}, {**there, "threads": 0}, {**there, "speed": math.inf}):
        (tmp_path / "node.json").write_text(json.dumps(wrong))
        refused = gpt2lab("run", ablation, "--dry-run", "--machine", "node.json")
        assert refused.code == 2 and "does not describe a machine" in refused.err
