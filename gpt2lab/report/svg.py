"""A matplotlib figure as clean SVG: text stays text, no inline style, no metadata, nothing loaded from anywhere.

matplotlib writes `style="..."` on every element, which a strict Content-Security-Policy blocks; presentation
attributes (`fill="..."`) it does not. Ids get the figure's name in front, so that several figures share a page, and in
a page the palette becomes CSS variables, so that they follow its light and dark scheme.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from xml.etree import ElementTree

import matplotlib
from matplotlib.figure import Figure

SVG = "http://www.w3.org/2000/svg"
XLINK = "http://www.w3.org/1999/xlink"
PNG_DPI = 200
FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
INK, MUTED, GRID, SURFACE = "#1b2430", "#5f6b7a", "#e3e7ec", "#ffffff"
BAND = "#eceff3"
# The baseline is ink-grey; the arms take Okabe and Ito's colours, ordered so that neighbours differ most.
BASELINE = "#4a5563"
ARMS = ("#0072b2", "#d55e00", "#009e73", "#b5579b", "#e69f00", "#3fa3e0")
VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", SURFACE: "--surface", BAND: "--band", BASELINE: "--arm-0"}
VARIABLES |= {colour: f"--arm-{i}" for i, colour in enumerate(ARMS, start=1)}
# From low to high: even steps of lightness, so that it reads in grey and without red or green (matplotlib's plasma,
# without the end that white would swallow; the page has lighter ones for its dark scheme).
RAMP = ("#130789", "#44039e", "#6f00a8", "#9613a1", "#b52f8c", "#cd4a76", "#e16462", "#f07f4f", "#fa9b3d")
VARIABLES |= {colour: f"--ramp-{i}" for i, colour in enumerate(RAMP)}
DRAWING: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "gpt2lab",  # without it, every id is drawn from a random source
    "font.family": "DejaVu Sans",  # ships with matplotlib; wider than what browsers put in its place, so labels fit
    "font.size": 9.5,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "text.parse_math": False,  # an arm may be called $x^2$
    "text.usetex": False,
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "figure.facecolor": SURFACE,
    "axes.facecolor": SURFACE,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}


@contextmanager
def drawing() -> Iterator[None]:
    """Figures drawn and saved inside look the same on every machine, whatever its matplotlibrc says."""
    defaults: dict[Any, Any] = {
        k: v for k, v in matplotlib.rcParamsDefault.items() if not k.startswith(("backend", "interactive"))
    }
    with matplotlib.rc_context({**defaults, **DRAWING}), warnings.catch_warnings():
        # The browser has glyphs that DejaVu lacks; only the width of such a label is a guess.
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from")
        yield


def render(figure: Figure, name: str, title: str, description: str) -> tuple[str, str]:
    """`figure` as (a stand-alone file with its own colours, markup for a page that defines the palette's variables).

    Call inside `drawing()`. The same figure gives the same text.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    root = ElementTree.fromstring(buffer.getvalue())
    for element in list(root.iter()):
        for child in list(element):
            if child.tag in (f"{{{SVG}}}metadata", f"{{{SVG}}}style"):
                element.remove(child)
        _to_attributes(element)
        _prefix_ids(element, name)
    _head(root, name, title, description)
    ElementTree.register_namespace("", SVG)
    alone = ElementTree.tostring(root, encoding="unicode")
    for element in root.iter():
        for key in ("fill", "stroke"):
            if variable := VARIABLES.get(element.get(key, "")):
                element.set(key, f"var({variable})")
    root.attrib.pop("width")
    root.attrib.pop("height")
    return alone, ElementTree.tostring(root, encoding="unicode")


def png(figure: Figure) -> bytes:
    """`figure` as pixels, for slides and papers; call inside `drawing()`. The same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=PNG_DPI, metadata={"Software": None})
    return buffer.getvalue()


def _head(root: ElementTree.Element, name: str, title: str, description: str) -> None:
    """What a screen reader says, and the defaults that matplotlib keeps in a style element."""
    root.attrib |= {"role": "img", "aria-labelledby": f"{name}-title {name}-desc", "font-family": FONTS}
    root.attrib |= {"stroke-linejoin": "round", "stroke-linecap": "butt"}
    for tag, text in (("desc", description), ("title", title)):
        element = ElementTree.Element(f"{{{SVG}}}{tag}", {"id": f"{name}-{tag}"})
        element.text = text
        root.insert(0, element)


def _to_attributes(element: ElementTree.Element) -> None:
    for item in element.attrib.pop("style", "").split(";"):
        key, _, value = (part.strip() for part in item.partition(":"))
        if key == "font":
            size = re.search(r"([\d.]+)px", value)
            element.set("font-size", size.group(1) if size else "9.5")
            if "bold" in value or re.search(r"\b[67]00\b", value):
                element.set("font-weight", "600")
        elif key == "font-size":
            element.set(key, value.removesuffix("px"))
        elif key and key not in ("font-family", "white-space"):
            element.set(key, value)
    if element.tag == f"{{{SVG}}}text":  # a halo, so that a label stays readable where a line runs behind it
        element.attrib |= {"stroke": SURFACE, "stroke-width": "2.5", "paint-order": "stroke"}
    if href := element.attrib.pop(f"{{{XLINK}}}href", None):
        element.set("href", href)


def _prefix_ids(element: ElementTree.Element, name: str) -> None:
    if own := element.get("id"):
        element.set("id", f"{name}-{own}")
    if (href := element.get("href", "")).startswith("#"):
        element.set("href", f"#{name}-{href[1:]}")
    if clip := element.get("clip-path"):
        element.set("clip-path", clip.replace("url(#", f"url(#{name}-"))
