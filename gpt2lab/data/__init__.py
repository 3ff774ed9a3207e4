"""Text and token data. Importing this package fills its slots, in the order in which components are listed."""

from gpt2lab.data import corpora, texts, tables, tokenfiles, english, curricula, tokenizers  # noqa: F401, I001
