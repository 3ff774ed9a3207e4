"""Folders that transformers reads, and the layout of our own: what goes in comes out again, to the last bit."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from their_gpt2 import SIZES, same_logits, their_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

import gpt2lab.pretrained.files
from gpt2lab import load_gpt2, load_model, save_gpt2, save_model
from gpt2lab.data.tokenizers import TokenizerSite
from gpt2lab.data.tokenizers import tokenizer as tokenizer_slot
from gpt2lab.errors import ConfigError, DataFault, EnvironmentFault
from gpt2lab.model import GPT, ModelConfig, build_model
from gpt2lab.pretrained.native import KeptTokenizer, read_record, tokenizer_in
from gpt2lab.registry import SLOTS, load_plugin
from gpt2lab.store import read_json, write_json

Theirs = Callable[..., GPT2LMHeadModel]
TINY = {"n_layer": 2, "n_head": 2, "n_embd": 8, "block_size": 16, "vocab_size": 50}
TEXT = "Hello, I'm a language model,\n\n  don't you know? 1,234 naïve 漢字 <|endoftext|> end"


def tiny(**changes: Any) -> GPT:
    return build_model(ModelConfig(**{**TINY, **changes}), seed=3)


def equal(a: GPT, b: GPT) -> bool:
    """Whether two models are one, weight by weight and bit by bit."""
    ours, others = a.state_dict(), b.state_dict()
    return ours.keys() == others.keys() and all(torch.equal(ours[name], others[name]) for name in ours)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mlp": "gelu", "norm": {"name": "layernorm", "eps": 1e-6}, "mlp_ratio": 3.0},
        {"head": "untied", "mlp": "relu2"},
        {"scores": {"name": "plain", "scale": 1.0}},
        {"dropout": 0.1, "scores": [{"name": "plain", "scale": 0.5}, {"name": "plain", "scale": 0.25}]},
    ],
    ids=str,
)
def test_there_and_back(tmp_path: Path, tokens: torch.Tensor, changes: dict[str, Any]) -> None:
    ours = tiny(**changes, vocab_size=61).eval()
    save_gpt2(ours, tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert isinstance(theirs, GPT2LMHeadModel) and same_logits(ours, theirs, tokens)
    theirs.save_pretrained(tmp_path / "again")
    for folder in ("out", "again"):
        read = load_gpt2(tmp_path / folder)
        assert equal(read, ours) and read.config.dropout == ours.config.dropout
        assert same_logits(read, theirs, tokens)


def test_the_files_of_transformers_come_out_as_they_went_in(folder: Path, tmp_path: Path) -> None:
    save_gpt2(load_gpt2(folder), tmp_path / "out")
    before, after = (load_file(where / "model.safetensors") for where in (folder, tmp_path / "out"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    settings = [json.loads((where / "config.json").read_text()) for where in (folder, tmp_path / "out")]
    inert = {"transformers_version", "use_cache", "n_ctx", "initializer_range", "reorder_and_upcast_attn",
             "add_cross_attention", "pad_token_id"}  # fmt: skip
    theirs, ours = ({k: v for k, v in s.items() if k not in inert and "summary" not in k} for s in settings)
    assert ours == theirs


def test_biases_that_are_not_there_are_zeros(tmp_path: Path, tokens: torch.Tensor) -> None:
    ours = tiny(bias=False, vocab_size=61).eval()
    save_gpt2(ours, tmp_path / "out")
    assert same_logits(ours, AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval(), tokens)


@pytest.mark.parametrize("vocab_size", [50257, 50304])
def test_the_tokenizer_goes_with_gpt2s_vocabulary(tmp_path: Path, vocab_size: int) -> None:
    save_gpt2(tiny(vocab_size=vocab_size), tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    ours = tokenizer_slot.build(tokenizer_slot.read("gpt2"), TokenizerSite(tmp_path))
    plain = TEXT.replace("<|endoftext|>", "")
    assert theirs(plain)["input_ids"] == ours.encode(plain).tolist()
    assert theirs.decode(theirs(TEXT)["input_ids"]) == TEXT and theirs("<|endoftext|>")["input_ids"] == [50256]
    assert theirs.eos_token_id == 50256 and theirs.model_max_length == TINY["block_size"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.generation_config.eos_token_id == model.config.eos_token_id == 50256


def test_no_tokenizer_goes_with_another_vocabulary(tmp_path: Path) -> None:
    save_gpt2(tiny(), tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "generation_config.json", "model.safetensors"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.eos_token_id is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"position": "rotary"}, "model.position: rotary"),
        ({"norm": "rmsnorm", "mlp": "swiglu"}, "model.norm: rmsnorm: .*model.mlp: swiglu"),
        ({"attention": {"name": "gqa", "n_kv_head": 1}}, "model.attention: gqa"),
        ({"residual": "deepnorm"}, "model.residual: deepnorm"),
        ({"stack": ["unet"]}, "model.stack: unet: .*nothing of the kind"),
        ({"embedding": ["plain", "smear"]}, "model.embedding: smear"),
        ({"scores": {"name": "plain", "qk_norm": True}}, "model.scores: plain with qk_norm True"),
        ({"scores": {"name": "plain", "scale": 0.3}}, "model.scores: plain.scale=0.3."),
        ({"head": {"name": "tied", "softcap": 15.0}}, "model.head: tied with softcap 15.0"),
        ({"mlp": ["gelu", "gelu_tanh"]}, "model.mlp: gelu, gelu_tanh: .*alike in all layers"),
        ({"mask": ["causal", "sliding_window"]}, "model.mask: sliding_window"),
    ],
    ids=str,
)
def test_what_transformers_lacks_is_refused_by_slot_and_kept_in_our_own(
    tmp_path: Path, tokens: torch.Tensor, changes: dict[str, Any], words: str
) -> None:
    model = tiny(**changes).eval()
    with pytest.raises(ConfigError) as caught:
        save_gpt2(model, tmp_path / "out")
    assert re.search(words, str(caught.value).replace("\n", " "))
    assert not (tmp_path / "out").exists()
    save_model(model, tmp_path / "own", precision="bf16")
    read = load_model(tmp_path / "own")
    assert equal(read, model) and read.config == model.config and not read.training
    assert torch.equal(read(tokens % 50), model(tokens % 50))
    with pytest.raises(ConfigError, match="gpt2lab's layout"):
        load_gpt2(tmp_path / "own")


PLUGIN = '''
from torch import nn
from gpt2lab.components.norm import norm

class Half(nn.Module):
    def __init__(self, site):
        super().__init__()
        self.width = site.width or site.dims.n_embd

    def forward(self, x):
        return x / 2

@norm.register("half", source="a test")
def half(site, *, by: float = 2.0):
    """Halves; a norm that no package has."""
    return Half(site)
'''


@pytest.mark.usefixtures("no_plugins_after")
def test_a_model_with_a_plug_in(tmp_path: Path) -> None:
    (tmp_path / "my_norms.py").write_text(PLUGIN)
    load_plugin(tmp_path / "my_norms.py")
    model = tiny(norm={"name": "half", "by": 4.0})
    save_model(model, tmp_path / "own")
    assert equal(load_model(tmp_path / "own"), model)
    del SLOTS["norm"]._components["half"]
    with pytest.raises(ConfigError, match=r"norm half comes from my_norms\.py, which is not loaded") as caught:
        load_model(tmp_path / "own")
    assert caught.value.hint == "--plugin my_norms.py"


def test_a_tokenizer_with_files_goes_along(tmp_path: Path) -> None:
    made = tmp_path / "made"
    made.mkdir()
    site = TokenizerSite(made, lambda: iter(["to be or not to be, that is the question " * 20]))
    choice = tokenizer_slot.read({"name": "bpe", "vocab_size": 262})
    tokenizer = tokenizer_slot.build(choice, site)
    save_model(tiny(vocab_size=262), tmp_path / "own", tokenizer=KeptTokenizer(choice, tuple(made.iterdir())))
    kept = tokenizer_in(tmp_path / "own", read_record(tmp_path / "own"))
    assert kept is not None and kept.choice == choice
    assert kept.build().encode("to be that").tolist() == tokenizer.encode("to be that").tolist()
    (tmp_path / "own" / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(DataFault, match=r"tokenizer\.json: damaged"):
        load_model(tmp_path / "own")


def test_one_flipped_bit_of_our_own_layout_is_found(tmp_path: Path) -> None:
    save_model(tiny(), tmp_path / "own", tokenizer="bytes")
    file = tmp_path / "own" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataFault, match=r"model\.safetensors: damaged"):
        load_model(tmp_path / "own")


def test_a_record_that_cannot_be_is_refused(tmp_path: Path) -> None:
    save_model(tiny(), tmp_path / "own")
    file = tmp_path / "own" / "gpt2lab.json"
    written = read_json(file) or {}

    def refused(words: str, **changes: Any) -> None:
        write_json(file, {**written, **changes})
        with pytest.raises((ConfigError, DataFault), match=words):
            load_model(tmp_path / "own")

    refused("of format 9", format=9)
    refused("precision 'fp8'", precision="fp8")
    refused("which is not in this folder", files={"../x": "0" * 64})
    refused("model.norm: unknown norm 'rmsnrom'", model={**written["model"], "norm": [{"name": "rmsnrom"}]})
    refused("model.n_layer: 'x' does not fit|model.n_layer: a whole number", model={**written["model"], "n_layer": "x"})
    refused("its weights are not those of its settings", model={**written["model"], "n_layer": 3})
    file.write_text(file.read_text().replace('"n_layer": 3', '"n_layer": 3000000'))  # before memory is taken for it
    with pytest.raises(DataFault, match="does not agree with its seal"):
        load_model(tmp_path / "own")
    with pytest.raises(ConfigError, match=r"there is no gpt2lab\.json"):
        load_model(tmp_path)


@pytest.mark.parametrize("save", [save_gpt2, save_model])
def test_a_stop_in_the_middle_leaves_the_old_folder_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save: Callable[..., Path]
) -> None:
    old, new = tiny(), build_model(ModelConfig(**TINY), seed=4)
    read = load_gpt2 if save is save_gpt2 else load_model

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gpt2lab.pretrained.files, "publish_folder", stop)
    with pytest.raises(KeyboardInterrupt):
        save(old, tmp_path / "out")
    assert not os.listdir(tmp_path)
    monkeypatch.undo()
    save(old, tmp_path / "out")
    home = "gpt2lab.pretrained.huggingface" if save is save_gpt2 else "gpt2lab.pretrained.native"
    monkeypatch.setattr(f"{home}.save_tensors", stop)
    with pytest.raises(KeyboardInterrupt):
        save(new, tmp_path / "out")
    assert equal(read(tmp_path / "out"), old) and os.listdir(tmp_path) == ["out"]
    monkeypatch.undo()
    monkeypatch.setattr(gpt2lab.pretrained.files, "publish_folder", stop)  # when the old folder is already aside
    with pytest.raises(KeyboardInterrupt):
        save(new, tmp_path / "out")
    assert equal(read(tmp_path / "out"), old) and os.listdir(tmp_path) == ["out"]
    monkeypatch.undo()
    save(new, tmp_path / "out")
    assert equal(read(tmp_path / "out"), new) and os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("save", [save_gpt2, save_model])
def test_weights_are_readable_by_whom_the_umask_allows(tmp_path: Path, save: Callable[..., Path]) -> None:
    before = os.umask(0o027)
    try:
        file = save(tiny(), tmp_path / "out") / "model.safetensors"
    finally:
        os.umask(before)
    assert oct(file.stat().st_mode & 0o777) == "0o640"


def test_a_full_disk_leaves_the_old_folder(tmp_path: Path, file_limit: Any) -> None:
    save_gpt2(tiny(), tmp_path / "out")
    with file_limit(1000), pytest.raises(EnvironmentFault, match="file size limit"):
        save_gpt2(tiny(n_layer=3), tmp_path / "out")
    assert equal(load_gpt2(tmp_path / "out"), tiny()) and os.listdir(tmp_path) == ["out"]


def test_files_of_others_are_not_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter.tex").write_text("years of work")
    for save in (save_gpt2, save_model):
        with pytest.raises(ConfigError, match=r"other files \(chapter\.tex\)"):
            save(tiny(), folder)
    assert os.listdir(folder) == ["chapter.tex"]
    with pytest.raises(ConfigError, match="a file of that name"):
        save_gpt2(tiny(), folder / "chapter.tex")


def test_a_folder_that_transformers_wrote_may_be_replaced(folder: Path) -> None:
    save_gpt2(load_gpt2(folder), folder)
    assert same_logits(load_gpt2(folder), their_model(), torch.arange(16)[None] % SIZES["vocab_size"])
