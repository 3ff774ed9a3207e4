"""Commands about components: components, explain, test-plugin."""

from __future__ import annotations

import functools
import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpt2lab.cli.run import Json, Plugin
from gpt2lab.errors import ConfigError, unknown

if TYPE_CHECKING:
    from gpt2lab.costs import Costs
    from gpt2lab.registry import Choice, Component, Slot

FLAGSHIP = "gpt2-124m"


def add_to(app: typer.Typer) -> None:
    """Put this file's commands into the application."""
    app.command()(components)
    app.command()(explain)
    app.command("test-plugin")(test_plugin)


def components(
    slot: Annotated[str | None, typer.Argument(help="List only this slot.", metavar="[SLOT]")] = None,
    plugin: Plugin = None,
    json_: Json = False,
) -> None:
    """List every component by slot. A * marks canonical GPT-2, or the default of data and training; a ! a
    deliberate bug."""
    slots = all_slots(plugin)
    if slot is not None and slot not in slots:
        raise ConfigError(unknown("slot", slot, slots), hint="gpt2lab components")
    shown = {slot: slots[slot]} if slot else slots
    if json_:
        print(json.dumps({name: [as_json(component) for component in one] for name, one in shown.items()}))
        return
    from rich.table import Table
    from rich.text import Text

    from gpt2lab.display import console_for
    from gpt2lab.registry import BUG

    console = console_for()
    for one in shown.values():
        table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
        for component in one:
            mark = "*" if component.name in defaults(one) else "!" if BUG in component.tags else " "
            table.add_row(
                Text(f"{mark} {component.name}"), Text(component.summary), Text(component.source, style="dim")
            )
        console.print(Text(f"{one.path}: {one.what}", style="bold"))
        console.print(table)


def explain(
    what: Annotated[str, typer.Argument(help="position=rotary, or mlp=moe,experts=4", metavar="SLOT=NAME")],
    plugin: Plugin = None,
) -> None:
    """Explain one component. Formula, shapes, options, cost at 124M, source."""
    slots = all_slots(plugin)
    slot, component, choice = chosen(what, slots)
    kind = {"per_layer": "one for all layers, or a list that repeats over them", "list": "an ordered list of parts"}
    print(f"{slot.path} = {component.name}\n\n{component.doc}\n")
    if component.parameters:
        from gpt2lab.schema import type_name

        print("options:")
        for name, parameter in component.parameters.items():
            default = "" if parameter.default is parameter.empty else f" = {parameter.default}"
            print(f"  {name}: {type_name(parameter.annotation)}{default}")
        print()
    if component.can:
        print(f"offers:  {', '.join(sorted(component.can))}")
    for other, word in component.needs.items():
        print(f"needs:   {other} that offers {word}")
    for line in cost_lines(choice):
        print(f"cost:    {line}")
    print(f"source:  {component.source}")
    if component.tags:
        print(f"tags:    {', '.join(sorted(component.tags))}")
    if slot.in_config:
        print(f"slot:    {slot.what} ({kind.get(slot.arity, 'one')}); {default_line(slot)}")
        print(f"yaml:    {slot.path}: {json.dumps(choice.written())}")
    else:
        print(f"slot:    {slot.what}")
        name = what.partition("=")[2]
        tracker = f"GPT2LAB_TRACKER={name} gpt2lab run FILE"
        print(f"use:     {tracker if slot.name == 'tracker' else f'gpt2lab eval --study NAME --{slot.name} {name}'}")
    print(f"code:    {inspect.getsourcefile(component.factory)}")


def test_plugin(
    file: Annotated[str, typer.Argument(help="A Python file that registers components.", metavar="FILE")],
) -> None:
    """Run the contract tests on your own components."""
    from rich.progress import track

    from gpt2lab.display import console_for
    from gpt2lab.registry import load_plugin
    from gpt2lab.testing import run_contract, variants

    all_slots(None)
    found = load_plugin(file)
    if not found:
        raise ConfigError("registers no component", where=file, hint="see docs/components.md")
    console = console_for()
    failed = 0
    for component in track(found, "contract", console=console, transient=True, disable=not console.is_terminal):
        outcomes = run_contract([component])
        wrong = [outcome for outcome in outcomes if outcome.problem]
        failed += bool(wrong)
        count = f"{len(outcomes)} checks on {len(variants(component))} variants"
        console.print(f"{component.slot}={component.name}: {count}, {len(wrong)} failed", markup=False, highlight=False)
        for outcome in wrong:
            console.print(f"  {outcome.case} {outcome.check}: {outcome.problem}", markup=False, highlight=False)
    if failed:
        raise SystemExit(2)


def all_slots(plugin: list[str] | None) -> dict[str, Slot]:
    """Every slot, filled with our components, those of installed packages, and those of plug-in files."""
    import gpt2lab.components
    import gpt2lab.data.corpora
    import gpt2lab.data.tokenizers
    import gpt2lab.evaluation
    import gpt2lab.optim
    import gpt2lab.tracking.mlflow  # noqa: F401
    from gpt2lab.registry import BESIDE_CONFIG, SLOTS, load_entry_points, load_plugin

    load_entry_points()
    for file in plugin or ():
        load_plugin(file)
    return {**SLOTS, **BESIDE_CONFIG}


def chosen(what: str, slots: dict[str, Slot]) -> tuple[Slot, Component, Choice]:
    """`slot=name,option=value,...` as slot, component and choice."""
    from gpt2lab.registry import Misfit

    slot, equals, rest = what.partition("=")
    if not equals:
        raise ConfigError(f"'{what}' is not SLOT=NAME", hint="gpt2lab explain position=rotary")
    if slot not in slots:
        raise ConfigError(unknown("slot", slot, slots), hint="gpt2lab components")
    name, *options = rest.split(",")
    given = dict(option.partition("=")[::2] for option in options)
    one = slots[slot]
    try:
        needed = _needed(one[name]) if name in one else {}
        choice = one.read({"name": name, **needed, **given})
    except Misfit as misfit:
        raise ConfigError(str(misfit), where=what, hint=f"gpt2lab components {slot}") from None
    return one, one[name], choice


def _needed(component: Component) -> dict[str, Any]:
    """A stand-in for options without a default, so that a component can be explained before it is used."""
    return {"paths": ["my_text/*.txt"]} if "paths" in component.parameters else {}


@functools.cache
def canonical_costs() -> Costs:
    """Those of GPT-2 124M."""
    from gpt2lab.costs import costs
    from gpt2lab.model import ModelConfig

    return costs(ModelConfig())


def cost_lines(choice: Choice) -> list[str]:
    """Parameters and FLOPs that the choice adds to canonical GPT-2 124M; nothing for slots outside the model."""
    from gpt2lab.costs import costs
    from gpt2lab.model import MODEL_SLOTS, ModelConfig
    from gpt2lab.testing.cases import placed

    if choice.slot not in MODEL_SLOTS:
        return []
    plain = canonical_costs()
    changed: dict[str, Any] = {choice.slot: placed(choice.slot, choice.full())}
    ours = costs(ModelConfig(**changed))
    more = ours.parameters - plain.parameters
    flops = ours.flops_per_token - plain.flops_per_token
    lines = [
        f"{ours.parameters:,} parameters at {FLAGSHIP} ({more:+,} against canonical)",
        f"{ours.flops_per_token / 1e6:,.1f} MFLOP per token, forward and backward ({flops / 1e6:+,.1f})",
    ]
    active = f"{ours.active_parameters:,} parameters work on one token"
    return lines + ([active] if ours.active_parameters != ours.parameters else [])


def defaults(slot: Slot) -> tuple[str, ...]:
    """What canonical GPT-2 has in a slot; outside the model, what is taken unless a preset says otherwise."""
    return (slot.default,) if isinstance(slot.default, str) else tuple(slot.default)


def default_line(slot: Slot) -> str:
    """`defaults` in words."""
    kind = "canonical GPT-2" if slot.path.startswith("model.") else "default"
    return f"{kind}: {', '.join(defaults(slot)) or 'none'}"


def as_json(component: Component) -> dict[str, Any]:
    """One component for programs."""
    from gpt2lab.schema import type_name

    return {
        "name": component.name,
        "summary": component.summary,
        "source": component.source,
        "options": {
            name: {
                "type": type_name(parameter.annotation),
                "default": None if parameter.default is parameter.empty else parameter.default,
            }
            for name, parameter in component.parameters.items()
        },
        "tags": sorted(component.tags),
        "can": sorted(component.can),
        "needs": dict(component.needs),
        "file": Path(inspect.getsourcefile(component.factory) or "").name,
    }
