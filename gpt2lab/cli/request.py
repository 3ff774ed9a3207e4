"""What a command line asks for: an ablation's file and what is put on top of it."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import typer

from gpt2lab import text as text_module

if TYPE_CHECKING:
    from gpt2lab.planning.ablation import LoadedAblation
    from gpt2lab.planning.plan import Plan
    from gpt2lab.store import Store


@dataclass(frozen=True, kw_only=True)
class Request:
    """The arguments that commands about an ablation share."""

    file: str
    scale: str | None = None
    seeds: int | Literal["auto"] | None = None
    arms: str | None = None
    set: tuple[str, ...] = ()
    plugin: tuple[str, ...] = ()
    budget: str | None = None
    jobs: int | None = None

    def ladder(self) -> list[Request]:
        """One request for each scale that is asked for: those of the file's `scales`, unless the command names one."""
        from gpt2lab.planning.ablation import ladder_of

        scales = () if self.scale else ladder_of(self.file)
        return [replace(self, scale=scale) for scale in scales] or [self]

    def ablation(self) -> LoadedAblation:
        """The ablation as it is asked for. Raises ConfigError."""
        from gpt2lab.planning.ablation import load_ablation

        wanted = [name.strip() for name in self.arms.split(",") if name.strip()] if self.arms is not None else None
        return load_ablation(
            self.file, scale=self.scale, overrides=self.set, arms=wanted, seeds=self.seeds,
            plugins=self.plugin,
        )  # fmt: skip

    def planner(self, store: Store) -> Callable[[Mapping[str, int] | None], Plan]:
        """Makes the plan from what is finished, with the data prepared once. Raises ConfigError."""
        ablation = self.ablation()
        seconds = seconds_of(self.budget) if self.budget else None
        from gpt2lab.data.progress import rich_progress
        from gpt2lab.data.shards import prepare
        from gpt2lab.evaluation.tasks import fetch_documents
        from gpt2lab.planning.plan import make_plan

        with rich_progress() as progress:
            data = prepare(ablation.arms[ablation.baseline].config.data, progress=progress)
        fetch_documents({name for arm in ablation.arms.values() for name in arm.config.evaluation.tasks})
        first: list[Plan] = []

        def planned(due: Mapping[str, int] | None = None) -> Plan:
            """What the budget chose at first stays chosen, however long runs then take."""
            asked: Any = ablation
            if first:
                kept = first[0]
                asked = replace(
                    ablation, arms={name: ablation.arms[name] for name in kept.arms}, seeds=kept.seeds,
                    contrasts=kept.ablation.contrasts, baseline_seeds=kept.ablation.baseline_seeds,
                )  # fmt: skip
            made = make_plan(asked, data, store, jobs=self.jobs, seeds_now=due, seconds=None if first else seconds)
            first[:] = first or [made]
            return replace(made, left_out=first[0].left_out)

        return planned

    def reproduce(self) -> str:
        """The command that repeats the study, without what only concerns this machine."""
        words = ["gpt2lab", "run", self.file]
        for option, value in (("--scale", self.scale), ("--seeds", self.seeds), ("--arms", self.arms)):
            words += [option, str(value)] if value else []
        words += ["--budget", self.budget] if self.budget else []
        words += [word for item in self.set for word in ("--set", item)]
        words += [word for item in self.plugin for word in ("--plugin", item)]
        return shlex.join(words)


def seeds_of(text: str) -> int | Literal["auto"]:
    """A number of seeds, or `auto`. Raises typer.BadParameter."""
    if text == "auto":
        return "auto"
    if not text.isdecimal() or not int(text):
        raise typer.BadParameter(f"{text!r} is neither a number from 1 on nor auto")
    return int(text)


def seconds_of(text: str) -> float:
    """Seconds of a time written as 6h, 45m, 90s or 2d. Raises typer.BadParameter."""
    try:
        return text_module.seconds_of(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
