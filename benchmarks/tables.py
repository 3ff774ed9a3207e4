"""`tables`: the tables of docs/performance.md, from one run on one machine, with what they were measured on."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks import options as o
from benchmarks.generate import GenerationComparison, GenerationSpec, Passage, compare_generation
from benchmarks.sides import Spec, work_against
from benchmarks.step import Comparison, compare
from gpt2lab import __version__
from gpt2lab.basics.cores import usable_cores
from gpt2lab.basics.text import memory as in_units
from gpt2lab.errors import ConfigError, EnvironmentFault, Gpt2labError, unknown
from gpt2lab.training.precision import device_name

PAGE = "docs/performance.md"
PARTS = ("step", "peers", "parts", "generation")
TEXTS = ((1, "fp32"), (8, "fp32"), (8, "bf16"))
"""Texts that are generated at once, and the precision of both sides."""
BEGIN, END = "<!-- measured on {}: by make bench -->", "<!-- end -->"
Say = Callable[[str], None]
Row = tuple[str, ...]


@dataclass(kw_only=True)
class Findings:
    """What one run measured. steps: ours against plain; peers, parts: against others' code, and against the plain model
    in our loop. absent: what could not be measured, with the reason."""

    where: dict[str, Any]
    steps: list[Comparison] = field(default_factory=list)
    peers: list[Comparison] = field(default_factory=list)
    parts: list[Comparison] = field(default_factory=list)
    generation: list[GenerationComparison] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)


def surroundings(device: torch.device, blocks: int) -> dict[str, Any]:
    """Hardware and versions."""
    return {
        "device": device.type, "name": device_name(device), "cores": usable_cores(), "threads": torch.get_num_threads(),
        "blocks": blocks, "torch": torch.__version__, "python": platform.python_version(), "gpt2lab": __version__,
        "date": datetime.now(UTC).date().isoformat(),
    }  # fmt: skip


def measure(
    parts: Sequence[str], configs: Sequence[str], passage: str, peers: Sequence[str], device: torch.device,
    *, blocks: int, say: Say,
) -> Findings:  # fmt: skip
    """Measure these of PARTS. passage: the configuration that generates. peers: as `--vs` names them; one that is not
    here, and a part that fails, are left out with the reason."""
    found = Findings(where=surroundings(device, blocks))
    compiles = device.type == "cuda"

    def tried(part: str, what: str, one: Callable[[], Any], into: list[Any]) -> None:
        if part not in parts:
            return
        say(f"{part}: {what}")
        try:
            into.append(one())
        except Gpt2labError as error:
            found.absent.append(f"{what}: {error.problems[0].what}")

    def step(config: str, vs: str, ours: str, theirs: str = "fp32", *, memory: bool = False) -> Comparison:
        specs = Spec("gpt2lab", ours, compile=compiles), Spec(vs, theirs)  # type: ignore[arg-type]
        return compare(config, work_against(vs, config), specs, device, blocks=blocks, memory=memory)

    def text(vs: str, sequences: int, precision: str) -> GenerationComparison:
        specs = GenerationSpec("gpt2lab", precision), GenerationSpec(vs, precision)  # type: ignore[arg-type]
        return compare_generation(Passage(passage, sequences, vs=vs), specs, device, blocks=blocks)

    for config in configs:
        for ours in ("fp32", "bf16"):
            what = f"{config} in {ours}"
            tried("step", f"{what}, plain", lambda c=config, p=ours: step(c, "plain", p, memory=True), found.steps)  # type: ignore[misc]
            tried("parts", f"{what}, engine", lambda c=config, p=ours: step(c, "engine", p, p), found.parts)  # type: ignore[misc]
        for vs in peers:
            tried("peers", f"{config}, {kind(vs)}", lambda c=config, v=vs: step(c, v, "fp32"), found.peers)  # type: ignore[misc]
    for vs in peers:
        # nanoGPT reads the whole text again for every token: eight texts at once take it half an hour
        for n, precision in TEXTS[: 1 if kind(vs) == "nanogpt" else None]:
            what = f"{passage}, {n} at once in {precision}, {kind(vs)}"
            tried("generation", what, lambda v=vs, n=n, p=precision: text(v, n, p), found.generation)  # type: ignore[misc]
    return found


def kind(vs: str) -> str:
    """A side without the path of its checkout."""
    return vs.partition("=")[0]


def page_of(found: Findings) -> str:
    """All tables, with a paragraph on where they were measured. Markdown."""
    where = found.where
    threads = f"{where['threads']} thread{'s' if where['threads'] > 1 else ''}"
    blocks = [
        f"{where['name']}, {where['cores']} cores, {threads}; torch {where['torch']}, Python {where['python']}, "
        f"gpt2lab {where['gpt2lab']}, {where['date']}. Medians of {where['blocks']} blocks, with 95 % intervals of the "
        "speed-up. The limit is one large matrix product in the same precision, in the blocks between."
    ]
    blocks += ["\n".join(table) for table in tables_of(found) if len(table) > 2]
    if found.absent:
        blocks.append("\n".join(["Not measured:", "", *(f"- {line}" for line in found.absent)]))
    return "\n\n".join(blocks)


def tables_of(found: Findings) -> Iterator[list[str]]:
    """The lines of each table, of which two are its head."""
    yield table(
        "step, ours | against plain | ms, ours | plain | of the limit | memory, ours | plain",
        *((f"{c.config}, {ours.precision}", ratio(c, c.sides), ms(ours.milliseconds), ms(theirs.milliseconds),
           f"{100 * ours.of_limit:.0f} %", in_units(ours.peak_memory_bytes), in_units(theirs.peak_memory_bytes))
          for c in found.steps for ours, theirs in [c.sides]),
    )  # fmt: skip
    yield table(
        "step | against | speed-up | ms, ours | theirs",
        *((c.config, theirs.name, ratio(c, c.sides), ms(ours.milliseconds), ms(theirs.milliseconds))
          for c in found.peers for ours, theirs in [c.sides]),
    )  # fmt: skip
    yield table(
        "default assembly against the plain model, both in our loop | speed-up",
        *((f"{c.config}, {c.sides[0].precision}", ratio(c, c.sides)) for c in found.parts),
    )
    yield table(
        "generation | against | speed-up | tokens/s, ours | theirs",
        *((f"{c.passage.config}, {c.passage.sequences} at once, {ours.precision}", theirs.name, ratio(c, c.sides),
           f"{ours.tokens_per_second:.4g}", f"{theirs.tokens_per_second:.4g}")
          for c in found.generation for ours, theirs in [c.sides]),
    )  # fmt: skip


def table(head: str, *rows: Row) -> list[str]:
    """A Markdown table. head: its columns, divided by bars."""
    columns = [name.strip() for name in head.split("|")]
    return [f"| {' | '.join(row)} |" for row in (columns, ["---", *["--:"] * (len(columns) - 1)], *rows)]


def ratio(found: Comparison | GenerationComparison, sides: Sequence[o.Named]) -> str:
    """A speed-up, with the precisions where they are not equal."""
    ours, theirs = sides
    unequal = f" ({ours.precision} against {theirs.precision})" if ours.precision != theirs.precision else ""
    return in_words(found.ratio, found.interval) + unequal


def in_words(value: float, interval: tuple[float, float] | None) -> str:
    """`1.21 [1.16, 1.26]`."""
    return f"{value:.2f}" + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else "")


def ms(milliseconds: float) -> str:
    return f"{milliseconds:.4g}"


def replaced(page: str, device: str, content: str) -> str:
    """The page with `content` between the marks of that type of device. Raises ConfigError where it has none."""
    begin = BEGIN.format(device)
    between = re.compile(f"(?<={re.escape(begin)}\n).*?(?={END})", re.DOTALL)
    if not between.search(page):
        raise ConfigError("the page has no place for these tables", where=PAGE, hint=f"lines {begin} and {END}")
    return between.sub(lambda _: f"\n{content}\n\n", page, count=1)


def tables(
    write: Annotated[bool, typer.Option("--write", help=f"Put them into {PAGE}.")] = False,
    only: Annotated[str, typer.Option("--only", help=f"Of {', '.join(PARTS)}.")] = ",".join(PARTS),
    configs: Annotated[
        str | None, typer.Option("--configs", help="Sizes, with commas; a,nano,b256,b50k,c on CPU, d on a GPU.")
    ] = None,
    generates: Annotated[str, typer.Option("--generate", help="Size of the model that generates.")] = "c",
    nanogpt: Annotated[Path | None, typer.Option("--nanogpt", help="A checkout of nanoGPT.")] = None,
    blocks: o.Blocks = 9,
    threads: o.Threads = None,
    device: o.Device = "cpu",
    json_: o.Json = False,
) -> None:
    """Measure every table of docs/performance.md in one run; with all parts it takes about an hour on two cores."""
    chosen = [name.strip() for name in only.split(",")]
    for name in chosen:
        if name not in PARTS:
            raise ConfigError(unknown("part", name, PARTS), where="--only")
    place = o.chosen_device(device, threads)
    page = Path(PAGE)
    if write and not page.is_file():
        raise EnvironmentFault("there is no such file here", where=PAGE, hint="from the root of a checkout")
    if write:
        replaced(page.read_text(encoding="utf-8"), place.type, "")
    sizes = configs or ("d" if place.type == "cuda" else "a,nano,b256,b50k,c")
    peers = ["transformers", *([f"nanogpt={nanogpt}"] if nanogpt else [])]
    say = (lambda text: typer.echo(text, err=True)) if not json_ else lambda text: None
    found = measure(chosen, sizes.split(","), generates, peers, place, blocks=blocks, say=say)
    if json_:
        print(json.dumps(asdict(found)))
    if write:
        page.write_text(replaced(page.read_text(encoding="utf-8"), place.type, page_of(found)), encoding="utf-8")
    elif not json_:
        print(page_of(found))
