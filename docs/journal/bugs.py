"""The two figures of docs/journal.md, from the runs of ablations/bugs.yaml.

python docs/journal/bugs.py RUNS        # the folder that `gpt2lab run ablations/bugs.yaml ... --runs RUNS` filled
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from gpt2lab.config import fill_slots
from gpt2lab.doctor import ExaminedRun
from gpt2lab.doctor.checks import read_by_attention
from gpt2lab.store import Store

HERE = Path(__file__).parent
PLUGIN = HERE.parents[1] / "ablations" / "bugs.py"
SOUND, BUG, FLOOR = "#7a7a7a", "#c1272d", "#2b6ca3"
COLOURS = 48
TITLES = {
    "leaky_mask": "leaky mask", "no_score_scale": "no 1/sqrt(d)", "softmax_axis": "softmax axis",
    "not_shifted": "targets not shifted", "not_zeroed": "gradients not zeroed", "not_divided": "sum not divided",
    "no_residual_scaling": "no residual scaling", "tie_broken": "tie broken", "decay_on_norms": "decay on norms",
    "schedule_too_fast": "schedule too fast",
}  # fmt: skip
AGAINST = {"not_divided": "accumulation", "schedule_too_fast": "accumulation"}
BY_DEPTH = "diag/activation_rms/"


class Museum:
    """The study's runs by arm, one for each seed."""

    def __init__(self, root: str) -> None:
        store = Store(root)
        self.study = store.study("bugs@nano")
        self.arms = {
            arm: [ExaminedRun.load(store.run(run)) for run in entry["runs"].values()]
            for arm, entry in self.study["arms"].items()
        }

    def pair(self, arm: str) -> list[tuple[list[ExaminedRun], str]]:
        """What an arm is compared with, and the arm, each with its colour."""
        return [(self.arms[AGAINST.get(arm, "sound")], SOUND), (self.arms[arm], BUG)]


def curve(axes: Axes, runs: Sequence[ExaminedRun], metric: str, colour: str, style: str = "-") -> None:
    """A metric of the journal against the step, one line for each seed."""
    for run in runs:
        series = run.series(metric)
        axes.plot(list(series), list(series.values()), style, color=colour, linewidth=0.9)


def over_steps(metric: str, *, log: bool = False) -> Callable[[Axes, Museum, str], None]:
    """A panel of one metric."""

    def draw(axes: Axes, museum: Museum, arm: str) -> None:
        for runs, colour in museum.pair(arm):
            curve(axes, runs, metric, colour)
        axes.set_yscale("log" if log else "linear")
        axes.set_xlabel(metric, fontsize=7)

    return draw


def objective(axes: Axes, museum: Museum, arm: str) -> None:
    """What is trained, and what is measured."""
    curve(axes, museum.arms["sound"], "val/loss", SOUND)
    curve(axes, museum.arms[arm], "val/loss", BUG)
    curve(axes, museum.arms[arm], "train/objective", BUG, ":")
    axes.set_yscale("log")
    axes.set_xlabel("val/loss; dotted: train/objective", fontsize=7)


def row_sums(axes: Axes, museum: Museum, arm: str) -> None:
    """Sums of the first block's attention weights by position, against the largest."""
    for runs, colour in museum.pair(arm):
        for run in runs:
            tokens = run.tokens[:, :-1]
            with torch.no_grad():
                ones, zeros = (read_by_attention(run.now, tokens, value)[0] for value in (1.0, 0.0))
            sums = (ones - zeros).norm(dim=-1).mean(0)
            axes.plot(sums / sums.max(), color=colour, linewidth=0.9)
    axes.set_xlabel("sum of attention weights, by position", fontsize=7)


def stream(axes: Axes, museum: Museum, arm: str) -> None:
    """Size of the stream behind each block before the first step."""
    for runs, colour in museum.pair(arm):
        for run in runs:
            first = run.rows[0]["metrics"]
            rms = [first[key] for key in sorted(key for key in first if key.startswith(BY_DEPTH))]
            axes.plot(range(1, len(rms) + 1), rms, "o-", color=colour, linewidth=0.9, markersize=3)
    axes.set_ylim(0)
    axes.set_xlabel("stream rms at step 0, by block", fontsize=7)


def apart(axes: Axes, museum: Museum, arm: str) -> None:
    """How far each token's row of the head lies from its embedding."""
    for run in museum.arms[arm]:
        tensors = {p.role.kind: p.tensor.detach() for p in run.now.params()}
        gap = (tensors["head"] - tensors["embedding"]).norm(dim=1) / tensors["embedding"].norm(dim=1)
        axes.plot(np.sort(gap.numpy()), color=BUG, linewidth=0.9)
    axes.axhline(0, color=SOUND, linewidth=0.9)
    axes.set_xlabel("|head - embedding| / |embedding|, tokens", fontsize=7)


def gains(axes: Axes, museum: Museum, arm: str) -> None:
    """Mean gain of every norm at the end."""
    for runs, colour in museum.pair(arm):
        for run in runs:
            means = [
                p.tensor.mean().item() for p in run.now.params() if p.name.endswith("weight") and p.tensor.ndim == 1
            ]
            axes.plot(means, "o-", color=colour, linewidth=0.9, markersize=3)
    axes.set_xlabel("mean gain at the end, by norm", fontsize=7)


def loss(axes: Axes, museum: Museum, arm: str) -> None:
    """The validation loss, and what counting pairs of tokens reaches."""
    for runs, colour in museum.pair(arm):
        curve(axes, runs, "val/loss", colour)
    axes.axhline(museum.study["floors"]["bigram"], color=FLOOR, linewidth=0.7, linestyle="--")
    axes.set_ylim(*((0, 18) if arm == "not_shifted" else (0, 6) if arm in ("leaky_mask",) else (1.8, 4)))


SIGNS: dict[str, Callable[[Axes, Museum, str], None]] = {
    "leaky_mask": over_steps("train/loss", log=True),
    "no_score_scale": over_steps("diag/attention_logit_max", log=True),
    "softmax_axis": row_sums,
    "not_shifted": objective,
    "not_zeroed": over_steps("train/grad_norm", log=True),
    "not_divided": over_steps("train/grad_norm", log=True),
    "no_residual_scaling": stream,
    "tie_broken": apart,
    "decay_on_norms": gains,
    "schedule_too_fast": over_steps("train/lr"),
}


def panels(museum: Museum, draw: Callable[[str], Callable[[Axes, Museum, str], None]]) -> Figure:
    """One panel for each mistake."""
    figure = Figure(figsize=(10.5, 4.4), dpi=100, layout="constrained")
    for axes, (arm, title) in zip(figure.subplots(2, 5).flat, TITLES.items(), strict=True):
        draw(arm)(axes, museum, arm)
        axes.set_title(title, fontsize=9)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def save(figure: Figure, name: str) -> None:
    """As a PNG of few colours, which is small."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    image = Image.open(buffer).convert("RGB").quantize(COLOURS)
    image.save(HERE / name, optimize=True)
    print(HERE / name, (HERE / name).stat().st_size, "bytes")


def main(root: str) -> None:
    """Draw both figures."""
    matplotlib.rcParams["font.family"] = "DejaVu Sans"
    fill_slots([PLUGIN])
    museum = Museum(root)
    save(panels(museum, lambda arm: loss), "bugs_loss.png")
    save(panels(museum, SIGNS.__getitem__), "bugs_signs.png")


if __name__ == "__main__":
    main(sys.argv[1])
