"""Commands that begin something: init, new, try."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpt2lab.basics.output import console_for
from gpt2lab.basics.text import signed
from gpt2lab.cli import options
from gpt2lab.cli.catalogue import FLAGSHIP, all_slots, chosen, defaults, option_places
from gpt2lab.cli.options import given, print_json, say
from gpt2lab.cli.project import FILE
from gpt2lab.errors import ConfigError, synonym, unknown
from gpt2lab.experiments import command

if TYPE_CHECKING:
    from gpt2lab.basics.progress import Event, Listener
    from gpt2lab.store import RunFolder

ABLATION = """# gpt2lab check {name}.yaml --scale {scale}            finds mistakes
# gpt2lab run {name}.yaml --scale {scale} --dry-run    prints its cost and the effect that it can detect
ablation: {name}
# Your question, in one sentence that a verdict can answer; it is printed above the result.
question: {question}
base: {base}  # replaced by --scale
baseline: {baseline}  # the arm that the others are compared with
# Your arms: each changes something. `gpt2lab components` lists components, `gpt2lab explain NAME` options and cost.
arms:
  {baseline}: {{}}
{arms}seeds: 3  # fewer than 3 allow no verdict
"""
EXAMPLE = """# The smallest difference that would matter to you, in nats; every scale has a default.
smallest_effect: {{nano: 0.05}}
# What you expect of each arm, written before any result; it is shown beside the result.
expected: {{{arm}: about equal}}
# If a change may need a different learning rate, each arm can search its own:
# tune: {{grid: {{optim.lr: [0.5x, 1x, 2x]}}}}
"""
PROJECT = """# defaults for options; the command line takes precedence
scale = "nano"
runs = "runs"
reports = "reports"
# plugins = ["parts.py"]
# jobs = 2
# campaign = "norms"   # the line of research in which hypotheses are counted
# tracking = "http://127.0.0.1:5000"   # an MLflow server; false logs nowhere
"""
IGNORED = "/runs/\n/reports/*@*/\n"
FIRST = "norms"
ALONE = "baseline"


def plain(value: Any) -> str:
    """A value in YAML's short form."""
    return value if isinstance(value, str) and re.fullmatch(r"[\w.+-][\w.+= ;-]*", value) else json.dumps(value)


def ablation_text(name: str, question: str, base: str, baseline: str, arms: Mapping[str, Mapping[str, Any]]) -> str:
    """An ablation file with comments: a baseline that changes nothing, and `arms`."""
    lines = ""
    for arm, changes in arms.items():
        lines += f"  {plain(arm)}: {{{', '.join(f'{key}: {plain(value)}' for key, value in changes.items())}}}\n"
    scale = "nano" if base == FLAGSHIP else base
    return ABLATION.format(name=name, question=question, base=base, baseline=baseline, arms=lines, scale=scale)


def example_text(name: str) -> str:
    """An ablation to begin with: of what its name speaks of, as `rope` or `qk_norm`, else of norms."""
    from gpt2lab.planning.ablation import load_ablation

    baseline, arms = named_parts(name)
    question = f"Does {next(iter(arms), '')} reach a lower loss than {baseline}?"
    if len(arms) > 1:
        question = f"Which of {', '.join([baseline, *arms])} reaches the lowest loss?"
    source = {"ablation": name, "question": question, "base": "nano", "baseline": baseline,
              "arms": {baseline: {}, **arms}, "seeds": 3}  # fmt: skip
    try:
        load_ablation(source)
    except ConfigError:  # nothing is named, or it needs more than itself
        baseline, arms = "layernorm", {"rmsnorm": {"model.norm": "rmsnorm"}}
        question = "Does RMSNorm reach the loss of LayerNorm?"
    text = ablation_text(name, question, FLAGSHIP, baseline, arms)
    return text + EXAMPLE.format(arm=plain(next(iter(arms))))


def named_parts(name: str) -> tuple[str, dict[str, dict[str, Any]]]:
    """A baseline, and an arm for every component, slot or option of the model or its optimizer in a name."""
    from gpt2lab.registry import BUG
    from gpt2lab.testing import Case, variants
    from gpt2lab.testing.cases import placed

    slots = {name: slot for name, slot in all_slots(None).items() if slot.path.startswith(("model.", "optim."))}
    parts = {part.name: part for slot in slots.values() for part in slot if BUG not in part.tags}
    baseline, arms = "", dict[str, dict[str, Any]]()
    for word in (name, *re.split(r"[_.+-]", name)):
        word = synonym(word, parts) or word
        case = None
        if word in parts and word not in defaults(slots[parts[word].slot]):
            case = Case(parts[word].slot, word)
        elif word.removesuffix("s") in slots:
            slot = slots[word.removesuffix("s")]
            left = (part.name for part in slot if part.name not in (*defaults(slot), "none"))
            case = next((Case(slot.name, part) for part in left), None)
        elif places := option_places(word, slots):
            examples = [example for place in places for example in variants(place) if word in example.options]
            case = examples[0] if examples else None
        if case:
            slot, choice = slots[case.slot], case.choice()
            arms[word if case.options else case.name] = {
                slot.path: placed(choice) if slot.arity == "list" else choice.written()
            }
            baseline = baseline or next(iter(defaults(slot)), ALONE)
        if arms and word == name:
            break
    return baseline if baseline not in arms else ALONE, arms


def write_new(file: Path, text: str, hint: str = "another name") -> None:
    """Write a file that must not be there. Raises ConfigError."""
    try:
        with file.open("x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError:
        raise ConfigError("is there already", where=str(file), hint=hint) from None


def file_of(name: str, where: str) -> Path:
    """NAME.yaml in this folder. Raises ConfigError for what is no name."""
    from gpt2lab.planning.declaration import variant_name

    return Path(f"{variant_name(name.removesuffix('.yaml'), where=where)}.yaml")


def new(
    name: Annotated[str, typer.Argument(help="Name of the ablation; the file is NAME.yaml.", metavar="NAME")],
) -> None:
    """Write a starter ablation file. It has comments; a NAME such as rope or qk_norm selects the arms."""
    file = file_of(name, "NAME")
    write_new(file, example_text(file.stem))
    print(f"{file}: edit it, then gpt2lab check {file} --scale nano")


def init() -> None:
    """Make this folder a project. Writes gpt2lab.toml, a starter ablation and .gitignore; keeps existing files."""
    write_new(Path(FILE), PROJECT, "gpt2lab new NAME writes another ablation into this project")
    files = {f"{FIRST}.yaml": example_text(FIRST), ".gitignore": IGNORED}
    missing = {name: text for name, text in files.items() if not Path(name).exists()}
    for name, text in missing.items():
        write_new(Path(name), text)
    print(f"{', '.join([FILE, *missing])}: next, gpt2lab run {FIRST}.yaml --dry-run")


def try_(
    context: typer.Context,
    changes: Annotated[
        list[str],
        typer.Argument(help="SLOT=NAME, SLOT=NAME,OPTION=VALUE or a setting such as optim.lr=0.002; may be several.",
                       metavar="CHANGE"),
    ],
    scale: options.Scale = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the run.", min=0, max=99)] = 0,
    set_: options.Set = None,
    promote: Annotated[
        str | None, typer.Option("--promote", help="Also write the ablation file NAME.yaml.", metavar="NAME")
    ] = None,
    campaign: options.Campaign = None,
    plugin: options.Plugin = None,
    max_days: options.MaxDays = options.MAX_DAYS,
    no_tracking: options.NoTracking = False,
    runs: options.Runs = options.RUNS,
    json_: options.Json = False,
) -> None:  # fmt: skip
    """Try a change with one seed. Shows its loss beside the baseline's at the same steps while it trains."""
    from gpt2lab.basics.early import started_early

    context.with_resource(started_early(wanted=True))
    from gpt2lab.cli.manage import side_by_side
    from gpt2lab.cli.run import refuse_failures, studies, train
    from gpt2lab.store.listing import curve_of

    scale = scale or "nano"
    file = file_of(promote, "--promote") if promote else None
    if file and file.exists():
        raise ConfigError("is there already", where=str(file), hint="another --promote NAME")
    changed, label = changes_of(changes, plugin), re.sub(r"[/\\,]+", ";", " ".join(changes))[:64].strip(" .")
    question = f"What does {label} change?"
    source = {
        "ablation": f"try-{re.sub(r'[^A-Za-z0-9_.+-]+', '-', label)}"[:60].rstrip("."),
        "question": question,
        "base": scale,
        "baseline": ALONE,
        "arms": {ALONE: {}, label: changed},
    }
    console = console_for(to_stderr=json_)
    [study] = studies(
        source, scale=scale, seeds=[seed], overrides=set_ or (), plugins=plugin or (), runs=runs, campaign=campaign
    )
    repeated = command("try", scale=scale, seed=seed or None, set=set_, plugin=plugin, campaign=campaign)
    study.reproduce = f"{repeated} {shlex.join(changes)}"
    arm, baseline = (study.store.run(study.plan().arms[name].runs[0].id) for name in (label, ALONE))
    result = train(
        study, console, tracking=not no_tracking, max_days=max_days,
        through=lambda listener: Beside(listener, arm, baseline),
    )  # fmt: skip
    refuse_failures(result)
    [contrast] = result.verdicts.contrasts
    ours, theirs = dict(curve_of(arm)), dict(curve_of(baseline))
    if file:
        write_new(file, ablation_text(file.stem, question, scale, ALONE, {label: changed}))
    if json_:
        curve = [{"step": step, "baseline": theirs[step], "arm": ours[step]} for step in sorted(ours.keys() & theirs)]
        record = {"study": study.name, "changes": changed, "seed": seed, "baseline": baseline.id, "arm": arm.id}
        judged = {"difference": contrast.difference, "word": contrast.word, "verdict": contrast.verdict}
        print_json({**record, "curve": curve, **judged, "file": file and str(file)})
        return
    table = side_by_side((ALONE, label), theirs, ours)
    console.print(table) if table else None
    say(console, f"{label}: {contrast.verdict}")
    if file:
        say(console, f"{file}: {command('run', file, scale=scale, set=set_, plugin=plugin, runs=given(runs))}")
    else:
        say(console, "with --promote NAME the same command writes an ablation file, for more seeds and a verdict")


def changes_of(written: Sequence[str], plugin: list[str] | None) -> dict[str, Any]:
    """Dotted key -> value, of components as `explain` takes them and of settings as --set does. Raises ConfigError."""
    from gpt2lab.config.source import read_override

    slots, changes = all_slots(plugin), dict[str, Any]()
    for text in written:
        key = text.partition("=")[0]
        if "." in key:
            key, value = read_override(text)[0], read_override(text)[1].tree
        else:
            slot, _, choice = chosen(text, slots)
            if not slot.in_config:
                in_config = [name for name, slot in slots.items() if slot.in_config]
                raise ConfigError(unknown("slot of a config", slot.name, in_config), hint="gpt2lab components")
            key, value = slot.path, choice.written()
        if key in changes:
            raise ConfigError("is changed twice", where=key, hint="gpt2lab try once for each")
        changes[key] = value
    return changes


class Beside:
    """A listener that passes events on, and says each new loss of a run beside the baseline's at the same step."""

    def __init__(self, listener: Listener, arm: RunFolder, baseline: RunFolder) -> None:
        self.listener, self.arm, self.baseline = listener, arm, baseline
        self.losses, self.steps = "", set[int]()

    def __call__(self, event: Event) -> None:
        from gpt2lab.basics.progress import Message
        from gpt2lab.store.listing import curve_of

        self.listener(event)
        losses = "" if isinstance(event, Message) else str([run.val_loss for run in event.runs])  # nan equals nan
        if losses in ("", self.losses):
            return
        self.losses = losses
        ours, theirs = dict(curve_of(self.arm)), dict(curve_of(self.baseline))
        for step in sorted(ours.keys() & theirs.keys() - self.steps):
            self.steps.add(step)
            change = signed(ours[step] - theirs[step])
            self.listener(Message(f"step {step:>5}: {ours[step]:.4f}, baseline {theirs[step]:.4f}: {change}"))
