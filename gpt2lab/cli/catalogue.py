"""Commands about components and models: components, explain, schema, test-plugin."""

from __future__ import annotations

import functools
import inspect
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpt2lab.basics.output import console_for
from gpt2lab.basics.text import plural
from gpt2lab.cli.options import Json, Plugin, print_json, say, table_of
from gpt2lab.errors import ConfigError, nearest, unknown

if TYPE_CHECKING:
    from gpt2lab.inspection.costs import Costs
    from gpt2lab.registry import Choice, Component, Slot

FLAGSHIP = "gpt2-124m"
ARITY = {"per_layer": "one for all layers, or a list that repeats over them", "list": "an ordered list of parts"}


def components(
    slot: Annotated[str | None, typer.Argument(help="List only this slot.", metavar="[SLOT]")] = None,
    matrix: Annotated[
        bool, typer.Option("--matrix", help="List pairs of components that do not combine, and why.")
    ] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="The table of docs/components.md.")] = False,
    plugin: Plugin = None,
    json_: Json = False,
) -> None:
    """List every component by slot. A * marks canonical GPT-2, or the default of data and training; a ! a
    deliberate bug."""
    slots: dict[str, Any] = all_slots(plugin) if matrix or markdown else listing(plugin)
    if slot is not None and slot not in slots:
        raise ConfigError(unknown("slot", slot, slots), hint="gpt2lab components")
    selected = {slot: slots[slot]} if slot else slots
    if matrix:
        print_matrix(slot, json_)
        return
    if markdown:
        print(markdown_table(selected.values()))
        return
    if json_:
        print_json({"slots": {name: slot_["components"] for name, slot_ in selected.items()}})
        return
    from rich.text import Text

    from gpt2lab.registry import BUG

    console = console_for()
    for group in selected.values():
        rows = []
        for component in group["components"]:
            mark = "*" if component["name"] in group["default"] else "!" if BUG in component["tags"] else " "
            source = Text(component["source"], style="dim")
            rows.append((f"{mark} {component['name']}", component["summary"], source))
        console.print(Text(f"{group['path']}: {group['what']}", style="bold"))
        console.print(table_of("", "", "", rows=rows))


def listing(plugin: list[str] | None) -> dict[str, Any]:
    """Every slot with its components as plain data."""
    from gpt2lab.analysis.verdicts import as_json as plain
    from gpt2lab.cli.kept import kept

    def answer() -> Any:
        return plain({
            name: {"path": slot.path, "what": slot.what, "default": defaults(slot),
                   "components": list(map(as_json, slot))}
            for name, slot in all_slots(plugin).items()
        })  # fmt: skip

    return dict(answer() if plugin else kept("components", None, answer))


def print_matrix(slot: str | None, json_: bool) -> None:
    """One line for each component and slot with refused pairs, and how many pairs there are."""
    from gpt2lab.config import load_config
    from gpt2lab.testing.assemblies import refused_pairs

    count, refused = refused_pairs(load_config(FLAGSHIP), slot)
    if json_:
        print_json(
            {"pairs": count, "refused": [dict(zip(("one", "other", "why"), pair, strict=True)) for pair in refused]}
        )
        return
    grouped: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for part, other, why in refused:
        slot, _, name = other.partition("=")
        grouped.setdefault((part, slot), []).append((name, why))
    rows = [(part, f"{slot}: {', '.join(name for name, _ in others)}", others[0][1])
            for (part, slot), others in grouped.items()]  # fmt: skip
    console = console_for()
    if grouped:
        console.print(table_of("component", "not with", "why", rows=rows))
    say(console, f"{count:,} pairs of components of two slots, {count - len(refused):,} of which combine; "
                 "options with limits of their own are checked by `gpt2lab check`")  # fmt: skip


def markdown_table(slots: Iterable[Slot]) -> str:
    """The table of components in docs/components.md; what packages and plug-ins add is left out."""
    lines = ["| slot | component | what it does | options | source |", "|---|---|---|---|---|"]
    for slot in slots:
        for component in slot:
            if component.factory.__module__.split(".")[0] != "gpt2lab":
                continue
            name = f"`{component.name}`"
            cells = (
                slot.name, f"**{name}**" if component.name in defaults(slot) else name,
                component.summary.partition("  ")[0], ", ".join(f"`{option}`" for option in component.parameters),
                component.source,
            )  # fmt: skip
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines)


def explain(
    what: Annotated[
        str, typer.Argument(help="rotary, position=rotary, mlp=moe,experts=4, or an option, as qk_norm",
                            metavar="[SLOT=]NAME")
    ],
    plugin: Plugin = None,
    json_: Json = False,
) -> None:  # fmt: skip
    """Explain one component, or an option. Shows formula, shapes, options, cost at 124M and source."""
    from gpt2lab.cli.kept import kept
    from gpt2lab.reports.inputs import PACKAGE

    explained = partial(explanation, what, plugin)
    answer = explained() if plugin else kept("explanations", (what, str(PACKAGE)), explained)
    print_json(answer["record"]) if json_ else print(answer["text"])


def explanation(what: str, plugin: list[str] | None) -> Any:
    """One component for programs (`record`) and for people (`text`), as plain data. Raises ConfigError."""
    from gpt2lab.analysis.verdicts import as_json as plain

    slots = all_slots(plugin)
    places = option_places(what, slots)
    if places and what not in slots and not any(what in slot for slot in slots.values()):
        return plain(option_explanation(what, places))
    slot, component, choice = chosen(what, slots)
    costs, effects = cost_lines(choice), effect_lines(choice)
    record: dict[str, Any] = {"slot": slot.name, "key": slot.path, "value": choice.written(), "doc": component.doc}
    lines = [f"{slot.path} = {component.name}\n\n{component.doc}\n"]
    if component.parameters:
        lines += ["options:", *(option_line(name, option) for name, option in component.parameters.items()), ""]
    facts = [
        ("offers", ", ".join(sorted(component.can))),
        *(("needs", f"{needed_slot} that offers {word}") for needed_slot, word in component.needs.items()),
        *(("cost", line) for line in costs),
        *(("effect", line) for line in effects),
        ("source", component.source),
        ("tags", ", ".join(sorted(component.tags))),
    ]
    if slot.in_config:
        default = "canonical GPT-2" if slot.path.startswith("model.") else "default"
        names = ", ".join(defaults(slot)) or "none"
        facts.append(("slot", f"{slot.what} ({ARITY.get(slot.arity, 'one')}); {default}: {names}"))
        facts.append(("yaml", f"{slot.path}: {json.dumps(choice.written())}"))
    else:
        name = what.partition("=")[2]
        use = {
            "tracker": f"GPT2LAB_TRACKER={name} gpt2lab run FILE",
            "diagnostic": f"evaluate: {{diagnostics: [{name}]}}",
            "task": f"gpt2lab eval --study NAME --tasks {name}",
        }
        facts += [("slot", slot.what), ("use", use.get(slot.name, f"gpt2lab eval --study NAME --{slot.name} {name}"))]
    facts.append(("code", str(inspect.getsourcefile(component.factory))))
    if places:
        facts.append(("also", f"{what} is an option of {', '.join(f'{place.slot}={place.name}' for place in places)}"))
    lines += [f"{label + ':':9}{text}" for label, text in facts if text]
    return plain(
        {"record": {**as_json(component), **record, "cost": costs, "effects": effects}, "text": "\n".join(lines)}
    )


def option_places(name: str, slots: Mapping[str, Slot]) -> list[Component]:
    """The components that have an option of this name, canonical ones first."""
    having = [component for slot in slots.values() for component in slot if name in component.parameters]
    return sorted(having, key=lambda component: component.name not in defaults(slots[component.slot]))


def option_facts(option: inspect.Parameter) -> dict[str, Any]:
    """Type and default of an option as plain data."""
    from gpt2lab.schema import type_name

    default = None if option.default is option.empty else option.default
    return {"type": type_name(option.annotation), "default": default}


def option_line(name: str, option: inspect.Parameter) -> str:
    """An option with its type, and its default if it has one."""
    facts = option_facts(option)
    return f"  {name}: {facts['type']}" + ("" if option.default is option.empty else f" = {facts['default']}")


def option_explanation(name: str, places: Sequence[Component]) -> dict[str, Any]:
    """An option for programs and for people: one component of each slot in full, the others by name."""
    from gpt2lab.registry import BESIDE_CONFIG, SLOTS
    from gpt2lab.testing import variants

    slots, shown, record = {**SLOTS, **BESIDE_CONFIG}, dict[str, list[str]](), list[dict[str, Any]]()
    for component in places:
        slot, option = slots[component.slot], component.parameters[name]
        needed = any(parameter.default is parameter.empty for parameter in component.parameters.values())
        meaning = re.search(rf"^{name}: +(.+(?:\n(?! *\w+:|\n).+)*)", component.doc, re.MULTILINE)
        place = {"slot": slot.name, "key": slot.path, "component": component.name, **option_facts(option)}
        place |= {"doc": " ".join(meaning[1].split()) if meaning else ""}
        record.append(place)
        if slot.name in shown:
            shown[slot.name].append(component.name)
            continue
        shown[slot.name] = []
        lines = [f"{slot.path} = {component.name}", option_line(name, option), f"  {place['doc']}"]
        example = next((case for case in variants(component) if name in case.options), None)
        if slot.in_config and (example or not needed):
            default = {"name": component.name, name: place["default"]}
            choice = example.choice() if example else slot.read(default)
            place |= {"value": choice.written() if example else default, "cost": cost_lines(choice)}
            lines.append(f"  yaml:  {slot.path}: {json.dumps(place['value'])}")
            lines += [f"  cost:  {line}" for line in place["cost"]]
        place["lines"] = [line for line in lines if line.strip()]
    text = [f"{name} is an option of {plural(len(places), 'component')}, not a component"]
    for place in record:
        for line in place.pop("lines", ()):
            text += ["", line] if not line.startswith(" ") else [line]
        if others := shown.pop(place["slot"], None):
            text.append(f"  also of {', '.join(others)}")
    more = f"gpt2lab explain {places[0].slot}={places[0].name}"
    return {"record": {"option": name, "of": record}, "text": "\n".join([*text, "", f"more: {more}"])}


def schema(
    kind: Annotated[str, typer.Argument(help="Kind of file: ablation, sweep or preset.", metavar="KIND")],
    plugin: Plugin = None,
) -> None:
    """Print the JSON schema of YAML files. Editors use it to complete and explain keys."""
    from gpt2lab.config import Config
    from gpt2lab.config.editor import json_schema
    from gpt2lab.planning.declaration import Ablation
    from gpt2lab.schema import Settings
    from gpt2lab.sweep.declaration import Sweep

    kinds: dict[str, type[Settings]] = {"ablation": Ablation, "sweep": Sweep, "preset": Config}
    if kind not in kinds:
        raise ConfigError(unknown("kind of file", kind, kinds), hint="gpt2lab schema ablation")
    all_slots(plugin)
    print(json.dumps(json_schema(kinds[kind], preset=kind == "preset"), indent=1))


def test_plugin(
    file: Annotated[str, typer.Argument(help="A Python file that registers components.", metavar="FILE")],
    component: Annotated[
        list[str] | None, typer.Option("--component", help="Test only this one.", metavar="NAME|SLOT=NAME")
    ] = None,  # noqa: PT028  (this is no test)
    check: Annotated[list[str] | None, typer.Option("--check", help="Run only this check.", metavar="CHECK")] = None,  # noqa: PT028
    json_: Json = False,  # noqa: PT028
) -> None:
    """Run the contract tests on your own components."""
    from rich.progress import track

    from gpt2lab.registry import load_plugin
    from gpt2lab.testing import CHECK_NAMES, run_contract, variants

    all_slots(None)
    registered = load_plugin(file)
    if not registered:
        what = (
            "nothing in it has contract tests; diagnostics, metrics, tasks, sections, trackers and executors have none"
        )
        raise ConfigError(what, where=file, hint="a small run with --plugin, see docs/extending.md")
    names = {name: entry for entry in registered for name in (entry.name, f"{entry.slot}={entry.name}")}
    for given, known, kind in ((component, names, "component"), (check, CHECK_NAMES, "check")):
        for name in given or ():
            if name not in known:
                raise ConfigError(unknown(kind, name, known), where=f"--{kind}")
    selected = [
        entry for entry in registered if component is None or {entry.name, f"{entry.slot}={entry.name}"} & {*component}
    ]
    console = console_for(to_stderr=json_)
    failed, tested = 0, list[dict[str, Any]]()
    for entry in track(selected, "contract", console=console, transient=True, disable=not console.is_terminal):
        outcomes = run_contract([entry], check or CHECK_NAMES)
        failures = [outcome for outcome in outcomes if outcome.problem]
        failed += bool(failures)
        said = [{"case": str(outcome.case), "check": outcome.check, "problem": outcome.problem} for outcome in failures]
        tested.append({"slot": entry.slot, "name": entry.name, "checks": len(outcomes), "failures": said})
        count = f"{plural(len(outcomes), 'check')} on {plural(len(variants(entry)), 'variant')}"
        say(console, f"{entry.slot}={entry.name}: {count}, {len(failures)} failed")
        lines = (f"  {outcome.case} {outcome.check}: {outcome.problem}" for outcome in failures)
        say(console, *lines, wrap=console.is_terminal)
    if json_:
        print_json({"components": tested})
    if failed:
        raise SystemExit(2)


LISTED = ("model", "data", "optim", "task", "evaluation", "metric", "tracker")
"""The order of slots, by what their paths begin with; among those of one package it is the order of its imports."""


def all_slots(plugin: list[str] | None) -> dict[str, Slot]:
    """Every slot, filled with our components, those of installed packages, and those of plug-in files; in the same
    order whatever was imported first."""
    from gpt2lab.config import fill_slots
    from gpt2lab.registry import BESIDE_CONFIG, SLOTS
    from gpt2lab.tracking import mlflow  # noqa: F401  (registers its tracker)

    fill_slots(plugin or ())
    rank = {section: number for number, section in enumerate(LISTED)}
    slots = {**SLOTS, **BESIDE_CONFIG}
    return dict(sorted(slots.items(), key=lambda item: rank.get(item[1].path.partition(".")[0], len(rank))))


def chosen(what: str, slots: dict[str, Slot]) -> tuple[Slot, Component, Choice]:
    """`slot=name,option=value,...` as slot, component and choice; of a name that one slot alone has, its default."""
    from gpt2lab.config import load_config
    from gpt2lab.registry import Misfit

    if "=" not in what:
        having = sorted(name for name, slot in slots.items() if what in slot)
        if len(having) > 1:
            raise ConfigError(
                f"{', '.join(having)} have a component {what}", hint=f"gpt2lab explain {having[0]}={what}"
            )
        if not having and what in slots:
            raise ConfigError(f"'{what}' is a slot, not a component", hint=f"gpt2lab components {what}")
        if not having:
            settings = [f"{section}.{key}" for section, part in load_config(FLAGSHIP).tree().items()
                        if isinstance(part, dict) for key in part]  # fmt: skip
            if key := next((key for key in settings if what in (key, key.partition(".")[2])), None):
                raise ConfigError(f"'{what}' is a setting, {key}, not a component", hint="gpt2lab schema preset")
            guess = nearest(what, sorted({name for slot in slots.values() for name in slot.names()}))
            suggestion = f"; did you mean '{guess}'?" if guess else ""
            raise ConfigError(f"'{what}' is not SLOT=NAME, nor a component{suggestion}",
                              hint="gpt2lab explain position=rotary")  # fmt: skip
        what = f"{having[0]}={what}"
    slot, _, rest = what.partition("=")
    if slot not in slots:
        raise ConfigError(unknown("slot", slot, slots), hint="gpt2lab components")
    name, *options = rest.split(",")
    values = dict(option.partition("=")[::2] for option in options)
    filled = slots[slot]
    # values for options without a default, so that a corpus of files can be explained before it is used
    options_of = filled[name].parameters if name in filled else {}
    examples = {"paths": ["my_text/*.txt"], "corpora": {"prose": "shakespeare", "code": "python"}}
    needed = {option: value for option, value in examples.items() if option in options_of}
    try:
        choice = filled.read({"name": name, **needed, **values})
    except Misfit as misfit:
        raise ConfigError(str(misfit), where=what, hint=f"gpt2lab components {slot}") from None
    return filled, filled[name], choice


@functools.cache
def canonical_costs() -> Costs:
    """Costs of GPT-2 124M."""
    from gpt2lab.inspection.costs import costs
    from gpt2lab.model import ModelConfig

    return costs(ModelConfig())


def cost_lines(choice: Choice) -> list[str]:
    """Parameters and FLOPs that the choice adds to canonical GPT-2 124M; nothing for slots outside the model."""
    from gpt2lab.inspection.costs import cache_numbers, costs
    from gpt2lab.model import MODEL_SLOTS, ModelConfig
    from gpt2lab.testing.cases import placed

    if choice.slot not in MODEL_SLOTS:
        return []
    plain = canonical_costs()
    changed: dict[str, Any] = {choice.slot: placed(choice)}
    changed_costs = costs(ModelConfig(**changed))
    more = changed_costs.parameters - plain.parameters
    flops = changed_costs.flops_per_token - plain.flops_per_token
    lines = [
        f"{changed_costs.parameters:,} parameters at {FLAGSHIP} ({more:+,} against canonical)",
        f"{changed_costs.flops_per_token / 1e6:,.1f} MFLOP per token, forward and backward ({flops / 1e6:+,.1f})",
    ]
    active = f"{changed_costs.active_parameters:,} parameters work on one token"
    lines += [active] if changed_costs.active_parameters != changed_costs.parameters else []
    kept, before = (2 * cache_numbers(ModelConfig(**parts)) for parts in (changed, {}))
    return [*lines, f"{kept:,.0f} bytes of cache per token in half precision ({kept - before:+,.0f})"]


def effect_lines(choice: Choice) -> list[str]:
    """What others measured for this component."""
    from gpt2lab.reports.published import published

    lines = []
    for effect in published():
        for side in (effect, effect.turned()):
            if (side.slot, side.component.partition("(")[0]) == (choice.slot, choice.name) and not side.is_setting:
                lines.append(f"{side} [{side.source}{f', {side.address}' if side.address else ''}]")
                break
    return lines


def defaults(slot: Slot) -> tuple[str, ...]:
    """Components of canonical GPT-2 in a slot; outside the model, the defaults."""
    return (slot.default,) if isinstance(slot.default, str) else tuple(slot.default)


def as_json(component: Component) -> dict[str, Any]:
    """One component as plain data."""
    return {
        "name": component.name,
        "summary": component.summary,
        "source": component.source,
        "options": {name: option_facts(option) for name, option in component.parameters.items()},
        "tags": sorted(component.tags),
        "can": sorted(component.can),
        "needs": dict(component.needs),
        "file": Path(inspect.getsourcefile(component.factory) or "").name,
    }
