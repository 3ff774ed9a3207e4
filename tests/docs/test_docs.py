"""The documents are right: commands and options exist, links lead somewhere, examples run, tables match the code."""

from __future__ import annotations

import ast
import difflib
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from benchmarks.__main__ import app as benchmarks
from gpt2lab.cli import app
from gpt2lab.cli.catalogue import all_slots, chosen
from gpt2lab.config import load_config
from gpt2lab.model import ModelConfig, build_model
from gpt2lab.planning.ablation import load_ablation, scales_of
from gpt2lab.pretrained.huggingface import save_gpt2
from gpt2lab.sweep.declaration import load_sweep

pytestmark = pytest.mark.usefixtures("no_plugins_after")

Call = Callable[..., Any]
ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "benchmarks" / "README.md",
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
WORKPLACE = re.compile(r"(?<![\w.])/(root|work|home|Users|mnt)/\w|localhost:\d|\bpypi\.org\b")


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced blocks of these languages."""
    return [text for language, text in FENCE.findall(page.read_text(encoding="utf-8")) if language in languages]


def commands() -> Iterator[tuple[str, list[str]]]:
    """(page, words) of every line in a shell block that calls gpt2lab or the benchmarks."""
    for page in PAGES:
        for block in blocks(page, "bash", "sh", "console"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line.removeprefix("$ ").partition(" > ")[0], comments=True)
                if words and words[0] == "gpt2lab":
                    yield page.name, words[1:]
                elif words[:3] == ["python", "-m", "benchmarks"]:
                    yield page.name, words[2:]


COMMANDS = list(dict.fromkeys((page, tuple(words)) for page, words in commands()))


def parsed(words: list[str]) -> tuple[str, dict[str, Any]]:
    """The command's name and parameters as the application itself reads them; nothing is run."""
    command: Any = typer.main.get_command(app)
    path: list[str] = []
    if words[:1] == ["benchmarks"]:
        command, path, words = typer.main.get_command(benchmarks), words[:1], words[1:]
    while hasattr(command, "commands"):
        assert words, f"{' '.join(path)} needs a command"
        name, *words = words
        assert name in command.commands, f"no command {' '.join([*path, name])}"
        command = command.commands[name]
        path.append(name)
    return " ".join(path), command.make_context(path[-1], list(words)).params


def test_the_readme_has_commands() -> None:
    assert len([words for page, words in COMMANDS if page == "README.md"]) > 5
    assert len(COMMANDS) > 80


def test_the_readme_is_a_page() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=lambda value: value if isinstance(value, str) else value[0])
def test_commands_and_options_exist(
    page: str, words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "--profile" in words:  # as the page's own project file has it
        [project] = re.findall(r"```toml\n(\[profiles.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
        (tmp_path / "gpt2lab.toml").write_text(project)
        monkeypatch.chdir(tmp_path)
    name, given = parsed(list(words))
    if name == "explain" and not given["plugin"]:
        chosen(given["what"], all_slots(None))
    if name == "components" and given["slot"]:
        assert given["slot"] in all_slots(None)
    file = str(given.get("file") or next(iter(given.get("files") or ()), ""))
    shipped = ROOT / file
    if name in ("run", "check") and file.startswith("ablations/"):
        scale = given["scale"] if (given["scale"] or "").rpartition(".")[2] != "yaml" else "nano"
        arms = given["arms"].split(",") if given["arms"] else None
        plugins = [ROOT / plugin for plugin in given["plugin"] or ()]
        load_ablation(
            shipped, scale=scale, overrides=given["set_"], arms=arms, seeds=given["seeds"], plugins=plugins
        )  # fmt: skip
    if name == "sweep":
        for scale in [given["scale"]] if given["scale"] else scales_of(shipped) or [None]:
            load_sweep(shipped, scale=scale, overrides=given["set_"] or ())


def test_a_wrong_command_or_option_would_be_found() -> None:
    for words in (["runn", "x.yaml"], ["run", "x.yaml", "--sedes", "3"], ["run"], ["data"], ["ui", "--port", "x"]):
        with pytest.raises(Exception, match=r"."):
            parsed(words)


MENTION = re.compile(r"\bgpt2lab ([a-z][a-z-]*)(?![\w=(])((?:(?!gpt2lab )[^\n`\"';|&])*)")
OPTION = re.compile(r"(?<![\w-])(--[a-z][a-z-]*|-[a-zA-Z](?=\s))")
CODE = re.compile(r"`[^`\n]+`")
SOURCES = [
    *(ROOT / "gpt2lab").rglob("*.py"),
    *(ROOT / "benchmarks").rglob("*.py"),
    *(ROOT / "ablations").rglob("*.py"),
    *(ROOT / "docs").rglob("*.py"),
]
TEXTS = [
    ROOT / "Makefile",
    ROOT / ".ci" / "run",
    *(ROOT / "ablations").rglob("*.yaml"),
    *(ROOT / "sweeps").rglob("*.yaml"),
    *(ROOT / "gpt2lab").rglob("*.yaml"),
    *(ROOT / "gpt2lab").rglob("*.j2"),
]


def strings(file: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of every string of a Python file; `{}` stands for what an f-string fills in."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "{}" for part in node.values]
            yield node.lineno, "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            yield node.lineno, node.value


APPLICATION: Any = typer.main.get_command(app)


def mentioned_wrongly(text: str) -> list[str]:
    """Each `gpt2lab COMMAND --option` of a text that the application does not have.

    In a sentence, as in "gpt2lab measures", only what has options or resembles a command counts.
    """
    wrong = []
    for found in MENTION.finditer(text):
        command = APPLICATION
        name, rest = found[1], found[2]
        if name not in command.commands:
            before = text[: found.start()].rstrip(" ")
            resembles = difflib.get_close_matches(name, command.commands, cutoff=0.75)
            if before[-1:] in ("", "`", "\n", ":", "(") or resembles or OPTION.search(rest):
                wrong.append(found[0].strip())
            continue
        command = command.commands[name]
        words = rest.split()
        if hasattr(command, "commands") and words and re.fullmatch("[a-z-]+", words[0]):
            if words[0] not in command.commands:
                wrong.append(found[0].strip())
                continue
            command = command.commands[words[0]]
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        known |= {"--help", "-h", "--debug"}
        wrong += [f"gpt2lab {name} {option}" for option in OPTION.findall(rest) if option not in known]
    return wrong


def test_every_command_in_a_string_of_the_package_exists() -> None:
    wrong = [
        f"{file.relative_to(ROOT)}:{line}: {mention}"
        for file in SOURCES
        for line, text in strings(file)
        for mention in mentioned_wrongly(text)
    ]
    assert not wrong, "\n".join(wrong)


def test_every_command_in_pages_and_comments_exists() -> None:
    texts = {file: file.read_text(encoding="utf-8") for file in TEXTS}
    for page in PAGES:
        outside = FENCE.sub("", page.read_text(encoding="utf-8"))
        texts[page] = "\n".join([*CODE.findall(outside), *blocks(page, "bash", "sh", "console", "text", "")])
    wrong = [
        f"{file.relative_to(ROOT)}: {mention}" for file, text in texts.items() for mention in mentioned_wrongly(text)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("run `gpt2lab watch`", ["gpt2lab watch"]),
        ("gpt2lab wipe", ["gpt2lab wipe"]),
        ("gpt2lab run x.yaml --sedes 3", ["gpt2lab run --sedes"]),
        ("try: gpt2lab data chekc", ["gpt2lab data chekc"]),
        (
            "measured by gpt2lab nosie nano, or gpt2lab measure --all",
            ["gpt2lab nosie nano, or", "gpt2lab measure --all"],
        ),
        ("`gpt2lab noise nano` measures it; gpt2lab measures in nats", []),
        ("gpt2lab data check, gpt2lab run {} -n 3 --debug", []),
    ],
)
def test_a_wrong_mention_would_be_found(text: str, wrong: list[str]) -> None:
    assert mentioned_wrongly(text) == wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    broken = []
    for target in LINK.findall(text):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            broken.append(target)
    assert not broken


def anchors(page: Path) -> set[str]:
    """What headings are called in links."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    heads = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_compile(page: Path) -> None:
    for number, block in enumerate(blocks(page, "python")):
        compile(block, f"{page.name}, block {number}", "exec")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_page_names_the_machine_it_was_written_on(page: Path) -> None:
    assert not WORKPLACE.search(page.read_text(encoding="utf-8"))


def test_the_walk_through_the_transformer_runs() -> None:
    for block in blocks(ROOT / "docs" / "transformer.md", "python"):
        exec(compile(block, "transformer.md", "exec"), {})


def test_presets_in_the_tables_have_the_sizes_that_they_are_said_to_have() -> None:
    from gpt2lab.inspection.costs import costs

    text = (ROOT / "docs" / "transformer.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w-]+)` \| (\d+) \| (\d+) \| (\d+) \| ([\d,]+) \| ([\d,.]+) M \|$", text, re.MULTILINE)
    assert len(rows) == 5
    for preset, layers, heads, channels, parameters, flops in rows:
        model = load_config(preset).model
        found = costs(model)
        said = (int(layers), int(heads), int(channels), int(parameters.replace(",", "")))
        assert said == (model.n_layer, model.n_head, model.n_embd, found.parameters), preset
        assert flops == f"{found.flops_per_token / 1e6:,.1f}", preset


def test_training_lengths_in_the_table_of_scales_are_those_of_the_presets() -> None:
    text = (ROOT / "docs" / "ablations.md").read_text(encoding="utf-8")
    said_by = {"nano": "0.82M", "nano-long": "3.3M", "micro": "1.5M", "mini": "100M", "gpt2-124m": "10.3B"}
    for preset, said in said_by.items():
        training = load_config(preset).training
        tokens, unit = training.steps * training.batch_tokens, said[-1]
        size = f"{tokens / {'M': 1e6, 'B': 1e9}[unit]:.{len(said.rstrip('MB').partition('.')[2])}f}{unit}"
        assert size == said, preset
        assert re.search(rf"^\| `{preset}`.*{re.escape(said)}", text, re.MULTILINE), preset


def test_the_table_of_components_is_that_of_the_registry(tmp_path: Path) -> None:
    """Whatever is imported first."""
    text = (ROOT / "docs" / "components.md").read_text(encoding="utf-8")
    backwards = "import gpt2lab.evaluation.metrics, gpt2lab.optim.schedules, gpt2lab.data.tokenizers"
    code = f"import gpt2lab.training.diagnostics; {backwards}; from gpt2lab.cli import main; main()"
    table = python(tmp_path, code, "components", "--markdown").stdout.strip()
    assert f"\n\n{table}\n\n" in text, "print it anew: gpt2lab components --markdown"


def example_files(folder: Path) -> list[str]:
    """Write the examples of all pages that begin with `# name`; -> their names."""
    written = []
    for page in PAGES:
        for block in blocks(page, "yaml", "python"):
            name = re.match(r"# ([\w.]+\.(?:yaml|py))\n", block)
            if name:
                (folder / name[1]).write_text(block, encoding="utf-8")
                written.append(name[1])
    return written


def python(folder: Path, code: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *words], cwd=folder, capture_output=True, text=True, check=False)


def test_example_files_are_valid(tmp_path: Path, gpt2lab: Call) -> None:
    assert sorted(example_files(tmp_path)) == [
        "decay.yaml", "finetune.yaml", "my_batches.py", "my_diagnostics.py", "my_executor.py", "my_mask.py",
        "my_metrics.py", "my_nano.yaml", "my_norm.py", "my_parts.py", "my_tasks.py", "my_tracker.py", "new_head.yaml",
        "new_norms.yaml", "poems.py", "sine.yaml",
    ]  # fmt: skip
    (tmp_path / "my_text").mkdir()
    (tmp_path / "my_text" / "a.txt").write_text("to be or not to be\n" * 9000, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        load_ablation(tmp_path / "new_norms.yaml", scale="nano")
        trunk = tmp_path / "runs" / "0123456789abcdef"
        trunk.mkdir(parents=True)
        (trunk / "config.yaml").write_text(load_config("nano").to_yaml(), encoding="utf-8")
        assert load_config("decay.yaml").first_step == 2000
        assert load_config("new_head.yaml").first_step == 0
        save_gpt2(build_model(ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=1024)), "gpt2")  # for the hub's
        assert load_config("finetune.yaml").model.n_embd == 8
        load_ablation(ROOT / "ablations" / "posenc.yaml", scale="my_nano.yaml")
    done = gpt2lab("check", "sine.yaml", "--plugin", "my_parts.py")
    assert done.code == 0, done.err
    done = gpt2lab("eval", "--study", "none", "--metric", "surprises,above=6", "--plugin", "my_metrics.py")
    assert "unknown study 'none'" in done.err and "surprises" not in done.err
    done = gpt2lab("eval", "--study", "none", "--metric", "surprise", "--plugin", "my_metrics.py")
    assert "did you mean 'surprises'?" in done.err


def test_solutions_of_exercises_are_judged_as_the_page_says(tmp_path: Path, gpt2lab: Call) -> None:
    example_files(tmp_path)
    done = gpt2lab("test-plugin", "my_mask.py", "--check", "no_look_ahead")
    assert done.code == 2 and "no_look_ahead: " in done.out, done.err
    done = gpt2lab("test-plugin", "my_norm.py", "--check", "no_look_ahead", "--check", "gradients")
    assert done.code == 0 and "0 failed" in done.out, done.err


def test_what_others_call_it_exists_there_and_here() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

    from gpt2lab.schema import flatten

    page = (ROOT / "docs" / "weights.md").read_text(encoding="utf-8")
    section = page.partition("## What others call it")[2].partition("\n## ")[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if "`" in line]
    rows = [(re.findall("`(.+?)`", row[2]), re.findall("`(.+?)`", row[3]), row[2]) for row in cells if len(row) == 4]
    ours = build_model(ModelConfig(n_layer=1, n_head=2, n_embd=8, block_size=4, vocab_size=9))
    theirs = GPT2LMHeadModel(
        GPT2Config(n_layer=1, n_head=2, n_embd=8, n_positions=4, vocab_size=9, bos_token_id=0, eos_token_id=0)
    )
    settings = {**vars(GPT2Config()), **TrainingArguments.__dataclass_fields__}
    keys = list(flatten(load_config("nano").tree()))
    parts = 0
    for there, here, said in rows:
        assert there and len(here) == 1
        if here[0].partition(".")[0] in ("model", "optim", "training", "evaluation"):
            assert any(key == here[0] or key.startswith(f"{here[0]}.") for key in keys), here
            assert [name for name in there if name not in settings] == []
            continue
        parts += 1
        own = ours.get_submodule(here[0])
        other = theirs.get_submodule(there[0] if there[0] == "lm_head" else f"transformer.{there[0]}")
        if isinstance(getattr(own, "weight", None), torch.nn.Parameter):
            assert own.weight.shape == (other.weight.T if "transposed" in said else other.weight).shape, here
    assert parts == 13 and len(rows) == 30


def test_the_example_diagnostic_is_measured(tmp_path: Path) -> None:
    example_files(tmp_path)
    (shown,) = (b for b in blocks(ROOT / "docs" / "extending.md", "yaml") if b.startswith("evaluate:"))
    arms = "ablation: x\nquestion: Which?\nbase: nano\nbaseline: a\narms: {a: {}, b: {model.norm: rmsnorm}}\n"
    (tmp_path / "watched.yaml").write_text(arms + shown)
    code = (
        "import torch\n"
        "from gpt2lab.model import build_model\n"
        "from gpt2lab.registry import load_plugin\n"
        "from gpt2lab.training.diagnostics import build, observes_updates\n"
        "load_plugin('my_diagnostics.py')\n"
        "from gpt2lab.planning.ablation import load_ablation\n"
        "config = load_ablation('watched.yaml').arms['a'].config\n"
        "*_, norm = build(config.evaluation.diagnostics)\n"
        "model = build_model(config.model)\n"
        "model.loss(*torch.arange(8).view(2, 1, 4)).backward()\n"
        "norm.before_update(model.params())\n"
        "print(observes_updates(norm), norm.metrics()['diag/gradient_norm/h.0.mlp.c_fc.weight']\n"
        "      == float(model.h[0].mlp.c_fc.weight.grad.norm()))\n"
    )
    done = python(tmp_path, code)
    assert done.stdout == "True True\n", done.stderr


def test_the_example_task_is_found(tmp_path: Path, gpt2lab: Call) -> None:
    example_files(tmp_path)
    done = gpt2lab("eval", "--study", "none", "--tasks", "capitals", "--plugin", "my_tasks.py")
    assert "unknown study 'none'" in done.err and "capitals" not in done.err


def test_compare_prints_what_the_page_shows(tmp_path: Path, gpt2lab: Call) -> None:
    page = ROOT / "docs" / "results.md"
    (table,), (shown,) = blocks(page, "csv"), blocks(page, "text")
    (tmp_path / "results.csv").write_text(table, encoding="utf-8")
    done = gpt2lab("compare", "results.csv", "--baseline", "learned", "--smallest-effect", "0.05")
    assert done.out == shown, done.err


@pytest.mark.slow
def test_example_components_pass_the_contract(tmp_path: Path, gpt2lab: Call) -> None:
    _, _, examples = (ROOT / "docs" / "components.md").read_text(encoding="utf-8").partition("## Worked examples")
    code = [text for language, text in FENCE.findall(examples) if language == "python"]
    (tmp_path / "my_parts.py").write_text("\n\n".join(code), encoding="utf-8")
    done = gpt2lab("test-plugin", "my_parts.py")
    assert done.code == 0, done.out + done.err


def guide() -> list[str]:
    """The blocks of the guide from an empty file to an ablation: a component, an ablation, commands."""
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    return [text for _, text in FENCE.findall(page.partition("From an empty file")[2])[:3]]


def test_the_guide_to_a_component_takes_less_than_twenty_lines() -> None:
    assert len([line for block in guide() for line in block.splitlines() if line.strip()]) < 20


@pytest.mark.slow
def test_the_guide_to_a_component_leads_to_an_ablation(tmp_path: Path, gpt2lab: Call) -> None:
    example_files(tmp_path)
    (tmp_path / "my_text").mkdir()
    (tmp_path / "my_text" / "a.txt").write_text("to be or not to be\n" * 9000, encoding="utf-8")
    (tmp_path / "tiny.yaml").write_text(
        "extends: my_nano.yaml\nmodel: {n_layer: 2, n_head: 2, n_embd: 16, block_size: 32}\n"
        "training: {steps: 20, batch_tokens: 64}\noptim: {warmup_steps: 2}\n"
    )
    test, run = (line.split()[1:] for line in guide()[2].splitlines())
    for words in (test, [*run, "--scale", "tiny.yaml", "--no-tracking"]):
        done = gpt2lab(*words)
        assert done.code == 0, done.out + done.err
    assert "9 trained now" in done.out, done.out
