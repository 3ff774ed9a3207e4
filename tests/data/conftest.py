"""A data home of its own for every test, and small texts in it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpt2lab.data.shards import DataConfig

LINE = "the king said to me and so my lord of fair night shall come again with love or death's héart 🙂"
WORDS = LINE.split()


def play_text(name: str, lines: int = 40) -> str:
    """A text that depends on its name alone, with line ends, accents and emoji."""
    rng = random.Random(name)
    return "".join(" ".join(rng.choices(WORDS, k=rng.randint(3, 9))) + "\n" for _ in range(lines))


@pytest.fixture(scope="session")
def play() -> Callable[..., str]:
    """play(name, lines): see play_text."""
    return play_text


@pytest.fixture(scope="session")
def stories() -> list[str]:
    """Ninety short texts, all different."""
    return [play_text(f"story {i}", lines=1 + i % 5) for i in range(90)]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GPT2LAB_DATA", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder of twelve files."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(12):
        (folder / f"play{i:02d}.txt").write_bytes(play_text(f"play{i}").encode())
    return folder


@pytest.fixture
def config(texts: Path) -> Callable[..., DataConfig]:
    """A DataConfig over `texts`: config(tokenizer="bytes", validation_fraction=0.2)."""

    def make(tokenizer: object = "bytes", paths: str = "*.txt", **rest: object) -> DataConfig:
        corpus = {"name": "text", "paths": [str(texts / paths)]}
        settings = {"corpus": corpus, "tokenizer": tokenizer, "validation_fraction": 0.2} | rest
        return DataConfig.model_validate(settings)

    return make


@pytest.fixture
def contents() -> Callable[[Path], dict[str, Any]]:
    """contents(folder): every byte of a prepared folder, but for when it was made."""

    def read(folder: Path) -> dict[str, Any]:
        manifest = json.loads((folder / "manifest.json").read_text())
        shards = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}
        return {**shards, **manifest, "created": None, "sha256": None}

    return read
