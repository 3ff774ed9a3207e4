"""A reading as one HTML page without scripts, which loads nothing from elsewhere."""

from __future__ import annotations

import io
import math
from base64 import b64encode
from html import escape

from PIL import Image
from torch import Tensor

from gpt2lab.evaluation.windows import shown
from gpt2lab.inspection.lens import Head, Reading

STYLE = """
:root { color-scheme: light dark; --ink: 48 112 224; --line: #8886 }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2.5rem }
code, td, .text, .keys, .queries { font-family: ui-monospace, monospace; white-space: pre }
.text { font-size: 1.1rem; line-height: 2; white-space: normal } .text span { border-radius: 3px; padding: 2px 0 }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: 13px }
th, td { border: 1px solid var(--line); padding: 1px 6px; text-align: center } th { font-weight: 600 }
th[scope=row] { text-align: left; white-space: nowrap } .right { outline: 2px solid #2a9d4a; outline-offset: -2px }
.bar { display: inline-block; height: .8em; background: rgb(var(--ink)) }
.shade { background: rgb(var(--ink) / calc(var(--p) * .55)) }
.heads { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .8rem }
details { border: 1px solid var(--line); border-radius: 6px; padding: .5rem }
details[open] { grid-column: 1 / -1 } details[open] summary .map { display: none }
summary { cursor: pointer; list-style: none; font-size: 13px } summary::-webkit-details-marker { display: none }
.map { display: block; aspect-ratio: 1; background: var(--map) no-repeat 0 0 / 100% 100%; image-rendering: pixelated;
  border: 1px solid var(--line); print-color-adjust: exact }
.big { display: grid; grid-template: auto auto / auto auto; justify-content: start; overflow-x: auto; font-size: 11px }
.big .map { width: calc(var(--n) * 15px); border: 0; outline: 1px solid var(--line) }
.keys { grid-column: 2; display: flex; align-items: end; padding-bottom: 3px }
.keys span { width: 15px; line-height: 15px; writing-mode: vertical-rl; transform: rotate(180deg) }
.queries span { display: block; height: 15px; line-height: 15px; text-align: right; padding-right: 4px }
"""
COLOUR = (48, 112, 224)


def page(name: str, reading: Reading) -> str:
    """The whole page."""
    title = f"How {escape(name)} reads a text"
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{title}</title><style>{STYLE}</style><h1>{title}</h1>",
        *text_section(reading), *next_section(reading), *lens_section(reading), *attention_section(reading),
    ]  # fmt: skip
    return "\n".join(parts) + "\n"


def text_section(reading: Reading) -> list[str]:
    """The text, each token shaded by how little it was expected."""
    spans = [f"<span>{token(reading.tokens[0])}</span>"]
    for piece, p in zip(reading.tokens[1:], reading.actual[-1], strict=True):
        spans.append(f"<span class=shade style='--p:{1 - p:.3f}' title='probability {p:.3f}'>{token(piece)}</span>")
    said = f"{len(reading.tokens)} tokens; the more colour, the less the model expected it."
    if not math.isnan(reading.losses[-1]):
        said += f" Mean loss {reading.losses[-1]:.3f} nats per token."
    return [f"<p class=text>{'<wbr>'.join(spans)}</p><p>{said}</p>"]


def next_section(reading: Reading) -> list[str]:
    """The likeliest continuations of the whole text."""
    rows = [
        f"<tr><td>{token(guess.token)}<td>{guess.probability:.4f}"
        f"<td style='text-align:left;min-width:8rem'><span class=bar style='width:{8 * guess.probability:.2f}rem'>"
        for guess in reading.guesses[-1][-1]
    ]
    head = "<tr><th scope=col>token<th scope=col>probability<th scope=col>"
    return ["<h2>What comes next</h2>", f"<table>{head}{''.join(rows)}</table>"]


def lens_section(reading: Reading) -> list[str]:
    """The best guess at every depth and token."""
    following = [*reading.tokens[1:], None]
    rows = [
        f"<tr><th scope=row>text<th scope=col>{'<th scope=col>'.join(map(token, reading.tokens))}<th scope=col>loss"
    ]
    for number, guesses in enumerate(reading.guesses):
        cells, loss = [], "" if math.isnan(reading.losses[number]) else f"{reading.losses[number]:.3f}"
        for best, actual in zip(guesses, following, strict=True):
            right = " right" if best[0].token == actual else ""
            others = ", ".join(f"{token(guess.token)} {guess.probability:.3f}" for guess in best)
            cells.append(f"<td class='shade{right}' style='--p:{best[0].probability:.3f}' title='{others}'>"
                         f"{token(best[0].token)}")  # fmt: skip
        rows.append(f"<tr><th scope=row>{reading.depth(number)}{''.join(cells)}<td>{loss}")
    return [
        "<h2>What each depth would predict</h2>",
        "<p>The stream behind each block, read by the final norm and the head as if no block followed (logit lens). "
        "Under each token stands the likeliest next one, the more colour the likelier; a frame: it is right.</p>",
        f"<div class=wide><table>{''.join(rows)}</table></div>",
    ]


def attention_section(reading: Reading) -> list[str]:
    """A map for every head, which opens with its tokens."""
    if not reading.heads:
        return ["<h2>Attention</h2><p>No block has attention weights.</p>"]
    pieces = "".join(f"<span>{token(piece)}</span>" for piece in reading.tokens)
    return [
        "<h2>Attention</h2>",
        "<p>A map for each head; open one for its tokens. Rows are tokens that look, columns those that they look at; "
        "more colour is more weight. Numbers are means over all tokens but the first.</p><div class=heads>",
        *(head_details(head, pieces, len(reading.tokens)) for head in reading.heads),
        "</div>",
    ]


def head_details(head: Head, pieces: str, tokens: int) -> str:
    """One head."""
    means = head.means()
    said = ", ".join(f"{name} {value:.2f}" for name, value in means.items() if not math.isnan(value))
    name = f"block {head.block}, head {head.head}"
    image = f"<i class=map role=img aria-label='attention of {name}: {said}'></i>"
    return (
        f"<details style='--n:{tokens};--map:url(data:image/png;base64,{b64encode(png(head.weights)).decode()})'>"
        f"<summary>{image}<b>{name}</b><br>{said}</summary>"
        f"<div class=big><div class=keys>{pieces}</div><div class=queries>{pieces}</div>{image}</div></details>"
    )


def token(piece: str) -> str:
    """A token as HTML."""
    return escape(shown(piece))


def png(weights: Tensor) -> bytes:
    """Weights (T, T) from 0 to 1 as an image of one colour, opaque for 1."""
    image = Image.fromarray((weights.clamp(0, 1) * 255).round().byte().numpy())
    image.putpalette(COLOUR * 256)
    file = io.BytesIO()
    image.save(file, "PNG", transparency=bytes(range(256)))
    return file.getvalue()
