"""Draw the figures of the notes from measures.py:  python docs/notes/figures.py [NAME ...]

Each function draws one file beside this one. The look is that of the reports (gpt2lab/reports/style.py).
"""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib
import measures as m
import torch
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from PIL import Image

from gpt2lab.reports.style import ARMS, BASELINE, INK, MUTED, drawing

matplotlib.use("Agg")
HERE = Path(__file__).parent
DPI = 160
BLUE, RED, GREEN, PINK, YELLOW = ARMS[:5]
COLOURS = 96  # enough for a few lines and their smooth edges; a third of the bytes


def panels(*titles: str) -> tuple[Figure, list[Axes]]:
    """A row of axes with a title on the left of each."""
    figure = Figure(figsize=(4.3 * len(titles), 2.9), layout="constrained")
    axes = [figure.add_subplot(1, len(titles), i + 1) for i in range(len(titles))]
    for one, title in zip(axes, titles, strict=True):
        one.set_title(title, loc="left", fontsize=9.5, color=INK, pad=8)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.06)  # type: ignore[union-attr]
    return figure, axes


def say(axes: Axes, x: float, y: float, text: str, colour: str, **how: object) -> None:
    """A word beside a line, in its colour."""
    given = {"fontsize": 8.5, "color": colour, "xytext": (4, 0), "textcoords": "offset points", "va": "center"} | how
    axes.annotate(text, (x, y), **given)


def ticks(axis: Axis, places: list[float]) -> None:
    """A logarithmic axis with these marks and no others, written as plain numbers."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_ticks(places, [f"{place:,g}" for place in places])
    axis.set_minor_locator(NullLocator())


def attention() -> Figure:
    """Scores and the softmax with and without 1/sqrt(D)."""
    widths = [1, 2, 4, 8, 16, 32, 64, 128, 256]
    found = m.score_sizes(widths)
    figure, (left, right) = panels("standard deviation of the scores", "keys that a query effectively looks at, of 256")
    for axes, kind in ((left, "sd"), (right, "keys")):
        axes.plot(widths, found[f"{kind} unscaled"], color=RED, marker="o", ms=4)
        axes.plot(widths, found[kind], color=BLUE, marker="o", ms=4)
        ticks(axes.xaxis, widths[::2])
        axes.set_xlabel("channels per head, D")
    left.plot(widths, [math.sqrt(w) for w in widths], color=MUTED, lw=0.9, ls=(0, (4, 2)))
    ticks(left.yaxis, [1, 2, 4, 8, 16])
    left.set_ylim(0.7, 22)
    say(left, 32, math.sqrt(32), "q·k", RED, xytext=(-16, 9))
    say(left, 32, 1, "q·k / √D", BLUE, xytext=(-20, 9))
    say(left, 4, 2, "√D", MUTED, xytext=(2, -9))
    right.set_ylim(0, 200)
    say(right, 32, found["keys"][5], "q·k / √D", BLUE, xytext=(-20, 10))
    say(right, 16, found["keys unscaled"][4], "q·k", RED, xytext=(6, 6))
    return figure


def positions() -> Figure:
    """Rotary scores and ALiBi's factors by distance."""
    length = 512
    figure, (left, right) = panels(
        "rotary: score of equal vectors, by distance", "ALiBi: factor on a weight, by distance"
    )
    for theta, colour in ((10000.0, BLUE), (100.0, RED)):
        left.plot(m.rotary_scores(length, theta=theta), color=colour, lw=1.2)
    left.set_xlabel("distance in tokens")
    left.set_ylim(-0.4, 1.05)
    say(left, 250, 0.62, "theta = 10,000", BLUE)
    say(left, 50, -0.34, "theta = 100", RED)
    factors = m.alibi_factors(length)
    for head, row in enumerate(factors):
        right.plot(range(1, length), row[1:], color=BLUE, alpha=0.35 + 0.08 * head, lw=1.4)
    ticks(right.xaxis, [1, 4, 16, 64, 256])
    right.set_xlabel("distance in tokens")
    say(right, 1, 0.25, "m = 1/2", INK, xytext=(-3, 0))
    say(right, 256, 0.6, "m = 1/256", INK, xytext=(-12, 0))
    return figure


def normalisation() -> Figure:
    """Gradients by depth under both placements."""
    n_layer = 24
    blocks = range(1, n_layer + 1)
    figure, (left, right) = panels(
        "gradient of the loss by the stream", "the same, in units of the last: larger weights"
    )
    for residual, colour in (("pre", BLUE), ("post", RED)):
        for init, dash in (("gpt2_tf", "solid"), ("gpt2", (0, (3, 1.4)))):
            left.plot(blocks, stream(n_layer, residual, init), color=colour, ls=dash)
    for variance, dash in ((m.GPT2_VARIANCE, "solid"), (1.0, (0, (3, 1.4))), (2.0, (0, (1, 1.3)))):
        for residual, colour in (("pre", BLUE), ("post", RED)):
            found = stream(n_layer, residual, "gpt2_tf", variance)
            right.plot(blocks, [x / found[-1] for x in found], color=colour, ls=dash)
    ticks(left.yaxis, [0.01, 0.02, 0.05, 0.1, 0.2])
    ticks(right.yaxis, [0.5, 1, 2, 5])
    for axes in (left, right):
        axes.set_xlabel("behind block")
        axes.set_xticks([1, 6, 12, 18, 24])
    left.set_ylim(0.009, 0.45)
    say(left, 10, 0.16, "pre, residual scaling", BLUE)
    say(left, 12, 0.0118, "pre", BLUE, xytext=(-14, 0))
    say(left, 11, 0.03, "post, with and without scaling", RED, xytext=(0, 2))
    say(right, 24, 4.4, "solid: v = 0.31, as GPT-2", INK, xytext=(0, 0), ha="right")
    say(right, 24, 3.75, "dashed: v = 1     dotted: v = 2", INK, xytext=(0, 0), ha="right")
    say(right, 20, 1.7, "pre", BLUE)
    say(right, 8, 0.8, "post", RED)
    return figure


def stream(n_layer: int, residual: str, init: str, variance: float = m.GPT2_VARIANCE) -> list[float]:
    """Gradients behind each block."""
    found: list[float] = m.gradients(m.small(n_layer, 192, residual=residual, init=init, variance=variance))["stream"]
    return found


def tying() -> Figure:
    """The first loss of a tied head, and where it comes from."""
    widths = [64, 128, 256, 512, 768, 1024]
    figure, (left, right) = panels("first loss, V = 50,257", "first logits, C = 768")
    line = list(range(0, 1101, 50))
    left.plot(line, [m.tied_first_loss(c) for c in line], color=MUTED, lw=1.2, ls=(0, (4, 2)))
    left.plot(widths, m.first_losses(widths), color=BLUE, marker="o", ms=5, ls="none")
    left.axhline(math.log(50257), color=BASELINE, lw=0.9)
    left.set_xlabel("channels, C")
    say(left, 1100, math.log(50257), "ln V", BASELINE, xytext=(-22, 8))
    say(left, 500, m.tied_first_loss(500), "ln V + C 0.02² / 2", MUTED, xytext=(-100, 14))
    logits = m.first_logits(m.ModelConfig(block_size=64))
    edges = torch.linspace(-3, 4, 141)
    others = torch.histogram(logits["others"].float(), edges, density=True).hist
    right.fill_between(edges[:-1] + 0.025, others, color=BLUE, alpha=0.25, lw=0)
    sd = math.sqrt(m.GPT2_VARIANCE)
    normal = torch.exp(-(edges**2) / (2 * sd**2)) / (sd * math.sqrt(2 * math.pi))
    right.plot(edges, normal, color=MUTED, lw=1.2, ls=(0, (4, 2)))
    right.plot(logits["own"], torch.full_like(logits["own"], 0.02), "|", color=RED, ms=9, alpha=0.6)
    right.set_xlabel("score")
    right.set_yticks([])
    right.set_ylim(0)
    say(right, 0.3, 0.6, "all other tokens", BLUE, xytext=(20, 0))
    say(right, 0.3, 0.5, "dashed: N(0, C 0.02²)", MUTED, xytext=(24, 0))
    say(right, 2.0, 0.1, "the token just read", RED, xytext=(0, 0))
    return figure


def initialisation() -> Figure:
    """The stream by depth with and without residual scaling."""
    figure, (left, right) = panels("rms of the stream at init, L = 12", "rms behind the last block")
    v, depths = m.mlp_variance(), [3, 6, 12, 24, 48]
    for init, colour in (("gpt2_tf", RED), ("gpt2", BLUE)):
        left.plot(range(13), m.stream_rms(m.small(12, 192, init=init)), color=colour, marker="o", ms=4)
        last = [m.stream_rms(m.small(n, 192, init=init))[-1] for n in depths]
        right.plot(depths, last, color=colour, marker="o", ms=4)
    start = 2 * m.GPT2_VARIANCE / 192
    for axes, places in ((left, list(range(13))), (right, depths)):
        axes.plot(places, [math.sqrt(start + n * v) for n in places], color=MUTED, lw=0.9, ls=(0, (4, 2)))
    left.set_xlabel("behind block")
    left.set_ylim(0)
    ticks(right.xaxis, depths)
    ticks(right.yaxis, [0.25, 0.5, 1, 2, 4])
    right.set_ylim(0.2, 4)
    right.set_xlabel("blocks, L")
    say(left, 6, 1.0, "gpt2_tf: no scaling", RED, xytext=(-98, 6))
    say(left, 8, 1.03, "MLPs alone", MUTED, xytext=(-2, -14))
    say(left, 6, 0.2, "gpt2: 1/√(2L)", BLUE, xytext=(-20, 12))
    say(right, 12, 1.5, "no scaling", RED, xytext=(-58, 6))
    say(right, 12, 0.295, "1/√(2L)", BLUE, xytext=(-16, 12))
    return figure


def parametrisation() -> Figure:
    """How far blocks, scores and logits move in a few steps, by width."""
    widths = [64, 128, 256, 512]
    figure, axes = panels("standard: rms of the change after 8 steps", "muP, base width 64: the same")
    for one, name in zip(axes, ("standard", "mup"), strict=True):
        found = m.moved_by_width(name, widths)["change"]
        for part, colour in (("logits", BLUE), ("block 1", RED), ("block 0", GREEN), ("scores 0", PINK)):
            values = [steps[-1] for steps in found[part]]
            one.plot(widths, values, color=colour, marker="o", ms=4)
            say(one, widths[-1], values[-1], part, colour, xytext=(6, 7 if part == "logits" else -2))
        ticks(one.xaxis, widths)
        ticks(one.yaxis, [0.01, 0.1, 1])
        one.set_ylim(0.005, 2.5)
        one.set_xlim(56, 1100)
        one.set_xlabel("channels, C")
    return figure


def schedule() -> Figure:
    """The three schedules, and how far Adam's first updates go."""
    steps, warmup = 19560, 700
    figure, (left, right) = panels("rate, as a share of the peak", "rms of Adam's update / rate, by step")
    for name, colour in (("cosine", BLUE), ("linear", RED), ("constant", GREEN)):
        left.plot(m.rates(name, steps, warmup), color=colour)
    left.set_xlabel("step")
    left.set_xticks(range(0, 20001, 5000), [f"{step:,}" for step in range(0, 20001, 5000)])
    left.set_ylim(0, 1.12)
    say(left, 9500, 0.72, "cosine", BLUE)
    say(left, 4000, 0.66, "linear", RED)
    say(left, 14500, 1.06, "constant", GREEN)
    sizes = m.adam_update_sizes(100)
    right.plot(range(1, 101), [m.noise_update_size(n) for n in range(1, 101)], color=MUTED, lw=1.0, ls=(0, (4, 2)))
    right.plot(range(1, 101), sizes, color=BLUE)
    say(right, 8, 0.42, "measured", BLUE)
    say(right, 20, 0.12, "formula for pure noise", MUTED)
    right.set_ylim(0, 1.1)
    right.set_xlabel("step")
    return figure


def accumulation() -> Figure:
    """What half precision loses in sums and in small gradients."""
    terms, tokens = 4096, 1024
    figure, (left, right) = panels("1 + 1 + ..., as a share of the true sum", "gradients that float16 turns to zero")
    for dtype, colour in ((torch.float32, GREEN), (torch.float16, BLUE), (torch.bfloat16, RED)):
        left.plot(range(1, terms + 1), m.running_sums(terms, dtype), color=colour)
    ticks(left.xaxis, [1, 16, 256, 2048])
    left.set_xlabel("terms")
    left.set_ylim(0, 1.1)
    say(left, 4096, 1.05, "float32", GREEN, xytext=(-36, 2))
    say(left, 2048, 0.85, "float16", BLUE, xytext=(-36, 0))
    say(left, 512, 0.5, "bfloat16", RED, xytext=(-50, 0))
    powers = list(range(21))
    # gradients are linear in the loss: those of a mean over more tokens are smaller by that factor
    for count, colour in ((1024, BLUE), (16_384, PINK), (524_288, RED)):
        lost = m.flushed_to_zero([2.0**p * tokens / count for p in powers], tokens=tokens)
        right.plot(powers, lost, color=colour)
    right.axvline(16, color=MUTED, lw=0.9, ls=(0, (4, 2)))
    right.set_xlabel("log2 of the loss scale")
    right.set_xticks(range(0, 21, 4))
    ticks(right.yaxis, [0.0001, 0.001, 0.01, 0.1, 1])
    right.set_ylim(0.00007, 1.2)
    say(right, 16, 0.5, "where it starts", MUTED, xytext=(-72, 0))
    say(right, 5, 0.06, "mean over 524,288 tokens", RED, xytext=(6, 6))
    say(right, 5, 0.003, "16,384", PINK, xytext=(6, 6))
    say(right, 2, 0.0017, "1,024", BLUE, xytext=(-30, -16))
    return figure


FIGURES: dict[str, Callable[[], Figure]] = {
    f.__name__: f
    for f in (attention, positions, normalisation, tying, initialisation, parametrisation, schedule, accumulation)
}


def main(names: list[str]) -> None:
    """Draw the figures of these names, or all."""
    torch.set_num_threads(1)
    for name in names or list(FIGURES):
        with drawing():
            pixels = io.BytesIO()
            FIGURES[name]().savefig(pixels, format="png", dpi=DPI)
        file = HERE / f"{name}.png"
        image = Image.open(pixels).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
        image.save(file, optimize=True)
        print(f"{file.name}  {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
