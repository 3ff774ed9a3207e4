"""Text generation: sampling settings, decoding with a key/value cache, and incremental text."""

from __future__ import annotations

from gpt2lab.generation.decoding import Sampling, generate, refuse_unless_it_fits
from gpt2lab.generation.reader import Reader
from gpt2lab.generation.text import Continuation, encoded

__all__ = ["Continuation", "Reader", "Sampling", "encoded", "generate", "refuse_unless_it_fits"]
