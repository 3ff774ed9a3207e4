"""Weights in and out: Hugging Face's layout of GPT-2, nanoGPT's checkpoints, and a layout of our own for every other
assembly."""

from gpt2lab.pretrained.hub import fetched
from gpt2lab.pretrained.huggingface import has_gpt2_tokenizer, load_gpt2, save_gpt2
from gpt2lab.pretrained.names import from_hf, to_hf
from gpt2lab.pretrained.nanogpt import load_nanogpt
from gpt2lab.pretrained.own import KeptTokenizer, is_own, load_model, read_record, save_model, tokenizer_in
from gpt2lab.pretrained.settings import GPT2_VOCABULARIES, misfits

__all__ = [
    "GPT2_VOCABULARIES",
    "KeptTokenizer",
    "fetched",
    "from_hf",
    "has_gpt2_tokenizer",
    "is_own",
    "load_gpt2",
    "load_model",
    "load_nanogpt",
    "misfits",
    "read_record",
    "save_gpt2",
    "save_model",
    "to_hf",
    "tokenizer_in",
]
