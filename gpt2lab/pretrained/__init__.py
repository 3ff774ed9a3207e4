"""Weights in and out: GPT-2 in Hugging Face's layout and nanoGPT's checkpoints (huggingface.py), gpt2lab's layout
for any assembly (native.py), and weights that a training starts from (origin.py)."""

from gpt2lab.pretrained.files import fetched, is_hub_name
from gpt2lab.pretrained.huggingface import (
    GPT2_VOCABULARIES,
    from_hf,
    has_gpt2_tokenizer,
    load_gpt2,
    misfits,
    save_gpt2,
    to_hf,
)
from gpt2lab.pretrained.native import KeptTokenizer, is_native, load_model, read_record, save_model, tokenizer_in

__all__ = [
    "GPT2_VOCABULARIES",
    "KeptTokenizer",
    "fetched",
    "from_hf",
    "has_gpt2_tokenizer",
    "is_hub_name",
    "is_native",
    "load_gpt2",
    "load_model",
    "misfits",
    "read_record",
    "save_gpt2",
    "save_model",
    "to_hf",
    "tokenizer_in",
]
