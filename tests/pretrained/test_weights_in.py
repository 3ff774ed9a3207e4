"""Weights of others: every form in which a GPT-2 comes, and every way in which it does not fit."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file
from their_gpt2 import SIZES, edit_weights, same_logits, their_model
from transformers import GPT2LMHeadModel

from gpt2lab import load_gpt2
from gpt2lab.errors import ConfigError, DataFault, EnvironmentFault
from gpt2lab.pretrained.origin import origin_of

Theirs = Callable[..., GPT2LMHeadModel]


def lines(error: ConfigError | DataFault) -> list[str]:
    return [str(problem) for problem in error.problems]


def test_a_folder_that_transformers_wrote(folder: Path, tokens: torch.Tensor) -> None:
    ours = load_gpt2(folder)
    assert same_logits(ours, their_model(), tokens) and not ours.training


def test_a_folder_in_several_files(theirs: Theirs, tmp_path: Path, tokens: torch.Tensor) -> None:
    theirs().save_pretrained(tmp_path, max_shard_size="20KB")
    assert not (tmp_path / "model.safetensors").exists() and len(list(tmp_path.glob("*.safetensors"))) > 2
    assert same_logits(load_gpt2(tmp_path), theirs(), tokens)
    gone = min(tmp_path.glob("model-*.safetensors"))
    gone.unlink()
    with pytest.raises(DataFault, match=gone.name):
        load_gpt2(tmp_path)


def test_an_index_names_files_beside_it_only(theirs: Theirs, tmp_path: Path) -> None:
    theirs().save_pretrained(tmp_path / "in", max_shard_size="20KB")
    index = tmp_path / "in" / "model.safetensors.index.json"
    written = json.loads(index.read_text())
    shutil.copy(tmp_path / "in" / next(iter(written["weight_map"].values())), tmp_path / "x.safetensors")
    written["weight_map"] = dict.fromkeys(written["weight_map"], "../x.safetensors")
    index.write_text(json.dumps(written))
    with pytest.raises(DataFault, match="not an index"):
        load_gpt2(tmp_path / "in")


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_a_pickled_file_with_old_names(folder: Path, tokens: torch.Tensor, prefix: str) -> None:
    weights = load_file(folder / "model.safetensors")
    old = {name.replace("transformer.", prefix): tensor for name, tensor in weights.items()}
    for layer in range(SIZES["n_layer"]):  # masks among the weights, as in the files of 2019
        old[f"{prefix}h.{layer}.attn.bias"] = torch.ones(1, 1, 16, 16)
        old[f"{prefix}h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    old["lm_head.weight"] = old[f"{prefix}wte.weight"]
    torch.save(old, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert same_logits(load_gpt2(folder), their_model(), tokens)


def test_a_tied_pair_under_the_heads_name_alone(folder: Path, tokens: torch.Tensor) -> None:
    safetensors.torch.save_model(their_model(), str(folder / "model.safetensors"))
    assert "transformer.wte.weight" not in load_file(folder / "model.safetensors")
    assert same_logits(load_gpt2(folder), their_model(), tokens)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers(folder: Path, tokens: torch.Tensor, prefix: str) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({prefix + name: tensor for name, tensor in weights.items()}, folder / "model.safetensors")
    assert same_logits(load_gpt2(folder), their_model(), tokens)


def test_a_lone_file_with_the_settings_beside_it_or_in_its_shapes(folder: Path, tokens: torch.Tensor) -> None:
    file = folder / "model.safetensors"
    assert same_logits(load_gpt2(file), their_model(), tokens)
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match="24 channels are no multiple of 64: the number of heads is not known"):
        load_gpt2(file)
    model = their_model(n_embd=128, n_head=2, n_inner=96)
    model.save_pretrained(folder)
    (folder / "config.json").unlink()
    ours = load_gpt2(file)
    assert same_logits(ours, model, tokens) and (ours.config.n_head, ours.config.head.name) == (2, "tied")
    edit_weights(folder, lambda weights: weights.update({"lm_head.weight": torch.zeros(61, 128)}))
    assert load_gpt2(file).config.head.name == "untied"
    qkv = "transformer.h.0.attn.c_attn.weight"
    edit_weights(folder, lambda weights: weights.update({qkv: weights[qkv].t().contiguous()}))
    with pytest.raises(ConfigError, match=r"linear layers are \(out, in\) as in nanoGPT"):
        load_gpt2(file)
    save_file({"a": torch.zeros(2)}, file)
    with pytest.raises(ConfigError, match="no weights of a GPT-2"):
        load_gpt2(file)


def test_a_model_in_memory_with_or_without_its_head(theirs: Theirs, tokens: torch.Tensor) -> None:
    model = theirs()
    assert same_logits(load_gpt2(model), model, tokens)
    assert same_logits(load_gpt2(model.transformer), model, tokens)


def test_half_precision_becomes_float32(folder: Path, theirs: Theirs) -> None:
    halved = theirs().to(torch.bfloat16)
    halved.save_pretrained(folder)
    ours = load_gpt2(folder)
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}
    assert torch.equal(ours.wte.weight, halved.transformer.wte.weight.float())


@pytest.mark.parametrize(
    "settings",
    [
        {"activation_function": "gelu"},
        {"activation_function": "gelu_pytorch_tanh"},
        {"activation_function": "relu2"},
        {"layer_norm_epsilon": 1e-2},
        {"n_inner": 40},
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
        {"reorder_and_upcast_attn": True},
        {"tie_word_embeddings": False},
    ],
    ids=str,
)
def test_settings_that_have_a_component_here(theirs: Theirs, tokens: torch.Tensor, settings: dict[str, Any]) -> None:
    model = theirs(**settings)
    ours = load_gpt2(model)
    assert same_logits(ours, model, tokens)
    inert = settings.keys() & {"reorder_and_upcast_attn"} or "gelu_pytorch_tanh" in settings.values()
    assert inert or not same_logits(ours, theirs(), tokens)  # the setting matters


def test_dropout_comes_along(theirs: Theirs) -> None:
    rates = {"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2}
    assert load_gpt2(theirs(**rates)).config.dropout == 0.2
    with pytest.raises(ConfigError, match=r"embd_pdrop 0\.1"):
        load_gpt2(theirs(**{**rates, "embd_pdrop": 0.1}))


def test_settings_that_have_none_are_all_told(folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"activation_function": "silu", "add_cross_attention": True, "n_layer": 0}
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError) as caught:
        load_gpt2(folder)
    assert len(caught.value.problems) == 3
    assert all(word in str(caught.value) for word in ("silu", "gelu_new", "add_cross_attention", "n_layer is 0"))


def test_another_kind_of_model_is_named(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match="llama"):
        load_gpt2(folder)


def test_every_difference_is_listed(folder: Path) -> None:
    def change(weights: dict[str, torch.Tensor]) -> None:
        del weights["transformer.h.1.ln_2.weight"], weights["transformer.wpe.weight"]
        weights["transformer.h.0.attn.c_attn.weight"] = torch.zeros(72, 24)
        weights["transformer.h.7.ln_1.bias"] = torch.zeros(24)
        weights["transformer.ln_f.bias"] = torch.zeros(24, dtype=torch.int8)

    edit_weights(folder, change)
    with pytest.raises(ConfigError) as caught:
        load_gpt2(folder)
    assert lines(caught.value)[1:] == [
        "wpe.weight: missing: (16, 24) is wanted",
        "h.1.ln_2.weight: missing: (24,) is wanted",
        "h.7.ln_1.bias: unexpected: (24,) found",
        "h.0.attn.c_attn.weight: (24, 72) is wanted, (72, 24) found",
        "ln_f.bias: int8: only floating-point weights are read",
    ]
    assert str(folder) in lines(caught.value)[0] and "5 differences" in lines(caught.value)[0]


def test_a_head_that_is_not_tied_is_not_dropped_in_silence(folder: Path) -> None:
    edit_weights(folder, lambda weights: weights.update({"lm_head.weight": torch.zeros(61, 24)}))
    with pytest.raises(ConfigError, match=r"lm_head\.weight: differs from wte\.weight"):
        load_gpt2(folder)


def test_damage_is_told_in_a_line(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DataFault, match=r"model\.safetensors: cannot be read"):
        load_gpt2(folder)
    file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"no pickle at all")
    with pytest.raises(DataFault, match=r"pytorch_model\.bin: cannot be read"):
        load_gpt2(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(DataFault, match=r"config\.json: not readable as JSON"):
        load_gpt2(folder)


class Bomb:
    """Runs code when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "ckpt.pt"])
def test_no_file_runs_code(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"model": Bomb(tmp_path / "ran")}, folder / name)
    with pytest.raises(DataFault, match="refused"):
        load_gpt2(folder if name.endswith("bin") else folder / name)
    (folder / name).write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(DataFault, match=r"refused|cannot be read"):
        load_gpt2(folder if name.endswith("bin") else folder / name)
    assert not (tmp_path / "ran").exists()


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        load_gpt2(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"none of model\.safetensors"):
        load_gpt2(tmp_path)
    with pytest.raises(ConfigError, match="no such folder"):
        load_gpt2(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="int is no GPT-2"):
        load_gpt2(3)


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Path]:
    """Begins the place of someone/tiny in the hub's cache, which is empty; there is no network in tests."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def begin() -> Path:
        stored = tmp_path / "hub" / "models--someone--tiny"
        (stored / "refs").mkdir(parents=True)
        (stored / "refs" / "main").write_text("0" * 40)
        return stored / "snapshots" / ("0" * 40)

    return begin


def test_a_hub_name_from_the_cache_without_a_network(
    folder: Path, cached: Callable[[], Path], tokens: torch.Tensor
) -> None:
    with pytest.raises(EnvironmentFault, match="the hub cannot be read") as caught:
        load_gpt2("someone/tiny")
    assert caught.value.hint and "folder" in caught.value.hint
    shutil.copytree(folder, cached())
    assert same_logits(load_gpt2("someone/tiny"), their_model(), tokens)


def test_a_hub_name_in_several_files(theirs: Theirs, cached: Callable[[], Path], tokens: torch.Tensor) -> None:
    snapshot = cached()
    theirs().save_pretrained(snapshot, max_shard_size="20KB")
    assert same_logits(load_gpt2("someone/tiny"), theirs(), tokens)
    min(snapshot.glob("model-*.safetensors")).unlink()
    with pytest.raises(EnvironmentFault, match="cannot be read"):
        load_gpt2("someone/tiny")


def test_a_tokenizer_on_the_hub_is_that_of_the_weights(theirs: Theirs, cached: Callable[[], Path]) -> None:
    snapshot = cached()
    theirs(vocab_size=50257, n_embd=8, n_head=1).save_pretrained(snapshot)
    (snapshot / "vocab.json").write_text('{"le": 0}')
    assert origin_of("someone/tiny").tokenizer is None  # GPT-2's size, and other tokens


def test_without_the_hubs_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(EnvironmentFault, match="needs huggingface_hub"):
        load_gpt2("someone/tiny")
