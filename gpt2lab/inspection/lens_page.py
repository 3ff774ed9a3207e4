"""A reading as one HTML page without scripts, which loads nothing from elsewhere."""

from __future__ import annotations

import io
import math
from base64 import b64encode
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image
from torch import Tensor

from gpt2lab.evaluation.windows import shown
from gpt2lab.inspection.lens import HeadMap, Reading

COLOUR = (48, 112, 224)


def page(name: str, reading: Reading) -> str:
    """The whole page."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, autoescape=True,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    templates.filters |= {"shown": shown, "finite": math.isfinite, "means": means, "image": image}
    return templates.get_template("lens_page.html.j2").render(name=name, reading=reading)


def means(head: HeadMap) -> str:
    """The means of a head in words."""
    return ", ".join(f"{name} {value:.2f}" for name, value in head.means().items() if not math.isnan(value))


def image(head: HeadMap) -> str:
    """The map of a head for the address of an image."""
    return b64encode(png(head.weights)).decode()


def png(weights: Tensor) -> bytes:
    """Weights (T, T) from 0 to 1 as an image of one colour, opaque for 1."""
    image = Image.fromarray((weights.clamp(0, 1) * 255).round().byte().numpy())
    image.putpalette(COLOUR * 256)
    file = io.BytesIO()
    image.save(file, "PNG", transparency=bytes(range(256)))
    return file.getvalue()
