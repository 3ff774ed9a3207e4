"""What a page shows, and checks that hold for every page."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

from gpt2lab.basics import text

HARMFUL = {"script", "iframe", "object", "embed", "link", "img", "image", "form", "base"}
HOSTILE = ["<script>alert(1)</script>", '"onload="alert(1)', "javascript:alert(1)", "$x^2$"]
LOADS = {"href", "src", "srcset", "action", "formaction", "poster", "data", "xlink:href", "background", "ping"}


class Reader(HTMLParser):
    """Tags, attributes and visible text of a page."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(source)
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def links(self) -> list[str]:
        return [str(a["href"]) for tag, a in self.tags if tag == "a"]


def assert_harmless(source: str, links: str = r"#|[\w.-]+$|figures/$") -> None:
    """Nothing runs, nothing is loaded, and the policy would stop both. links: pattern of the addresses allowed."""
    tags = Reader(source).tags
    assert not {tag for tag, _ in tags} & HARMFUL
    for tag, attributes in tags:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], (tag, attributes)
        for name in LOADS & attributes.keys():
            assert re.match(links, str(attributes[name])), (tag, attributes)
    css = source.partition("<style>")[2].partition("</style>")[0]
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    policies = [a["content"] for _, a in tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies == [f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"]
    assert "@import" not in css and "url(" not in css


def assert_shown_as_text(folder: Path, names: Iterable[str] = HOSTILE) -> None:
    """A page and its twin show the names, and nothing of them is markup, a formula or a control character."""
    source, twin = (folder / "index.html").read_text(), (folder / "report.md").read_text()
    assert_harmless(source)
    shown = Reader(source).text
    for name in names:
        assert name in shown
        assert text.markdown(name) in twin
    outside_code = re.sub(r"^```.*?^```", "", twin, flags=re.S | re.M)
    assert "<" not in outside_code
    assert "$" not in outside_code
    assert "\x1b" not in source + twin
    for figure in (folder / "figures").glob("*.svg"):
        assert "<script" not in figure.read_text()


def part_of(twin: str, title: str) -> str:
    """The section of a page's Markdown under this heading."""
    return twin.partition(f"## {title}")[2].partition("\n## ")[0]


def assert_plain_svg(root: ElementTree.Element) -> None:
    """Shapes and text only: nothing that runs, is loaded or is styled inline."""
    allowed = {"svg", "title", "desc", "defs", "clipPath", "g", "path", "rect", "use", "text"}
    assert {element.tag.rpartition("}")[2] for element in root.iter()} <= allowed
    assert not [name for element in root.iter() for name in element.attrib if name.startswith("on") or name == "style"]


def assert_twin(folder: Path) -> list[str]:
    """The Markdown says all that the page says, and shows the figures that lie in the folder -> their names."""
    source, twin = (folder / "index.html").read_text(), (folder / "report.md").read_text()
    bare = re.sub(r"<svg.*?</svg>|<style>.*?</style>|<head>.*?</head>|<footer.*?</footer>", "", source, flags=re.S)
    plain = re.sub(r"\s+", " ", html.unescape(re.sub(r"\\(?=[^\w\s]|_)", "", twin)))
    sentences = [s for s in (re.sub(r"\s+", " ", w).strip() for w in Reader(bare).words) if s]
    assert len(sentences) > 100
    assert [s for s in sentences if s not in plain] == []
    figures = sorted(path.stem for path in (folder / "figures").glob("*.svg"))
    assert figures == sorted(re.findall(r"\(figures/([^)]+)\.svg\)", twin))
    return figures


def assert_same_files(one: Path, other: Path) -> None:
    files = [sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file()) for folder in (one, other)]
    assert files[0] == files[1]
    assert [str(file) for file in files[0] if (one / file).read_bytes() != (other / file).read_bytes()] == []
