"""Text and token data."""

from gpt2lab.data import english  # noqa: F401  (fills the slot)
