"""From a model to text: sampling settings, a token at a time on top of the key/value cache, and text as it grows."""

from __future__ import annotations

from gpt2lab.generation.decoding import Sampling, generate, refuse_unless_it_fits
from gpt2lab.generation.reader import Reader
from gpt2lab.generation.text import Continuation, encoded

__all__ = ["Continuation", "Reader", "Sampling", "encoded", "generate", "refuse_unless_it_fits"]
