"""The shipped presets are what their names say."""

from __future__ import annotations

import pytest
import torch

from gpt2lab.config import ALIASES, Config, config_from_text, load_config, preset_name, preset_names
from gpt2lab.model import GPT

SIZES = {
    "gpt2-124m": (12, 12, 768, 124_439_808),
    "gpt2-355m": (24, 16, 1024, 354_823_168),
    "gpt2-774m": (36, 20, 1280, 774_030_080),
    "gpt2-1558m": (48, 25, 1600, 1_557_611_200),
}
CORPUS_TOKENS = {"nano": 4_783_427, "nano-long": 4_783_427, "micro": 31_024_760, "mini": 25_711_429}  # for training


def test_all_presets_are_there() -> None:
    assert set(preset_names()) == {*SIZES, "nano", "nano-long", "micro", "mini"}


@pytest.mark.parametrize("name", [*SIZES, "nano", "nano-long", "micro", "mini"])
def test_a_preset_reads_back_equal(name: str) -> None:
    config = load_config(name)
    assert config_from_text(config.to_yaml()) == config
    assert config.model.dropout == 0 and config.model.bias and config.seed == 0


def parameters(config: Config) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in GPT(config.model).parameters())


@pytest.mark.parametrize("name", SIZES)
def test_gpt2_presets_have_gpt2_s_sizes(name: str) -> None:
    config = load_config(name)
    model = config.model
    assert (model.n_layer, model.n_head, model.n_embd, parameters(config)) == SIZES[name]


def test_the_124m_recipe() -> None:
    config = load_config("gpt2-124m")
    optim, training = config.optim, config.training
    assert (training.batch_tokens, training.steps, training.precision) == (524_288, 19_560, "bf16")
    assert (optim.lr, optim.warmup_steps, optim.grad_clip) == (6e-4, 700, 1.0)
    assert optim.optimizer.options == {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    assert (optim.schedule.name, optim.schedule.options["final_fraction"]) == ("cosine", 0.0)  # llm.c: -q 0.0
    assert config.scale.smallest_effect == 0.005 and training.micro_batch_sequences == 16


def test_other_names_of_gpt2_presets() -> None:
    assert load_config("gpt2-medium") == load_config("gpt2-355m")
    assert {preset_name(alias) for alias in ALIASES} <= set(preset_names())
    assert preset_name("runs/mine.yaml") == "mine"


def test_nano_is_as_designed() -> None:
    nano, long = load_config("nano"), load_config("nano-long")
    sizes = nano.model.n_layer, nano.model.n_head, nano.model.n_embd, nano.model.block_size, nano.model.vocab_size
    assert sizes == (4, 4, 128, 128, 256)
    assert (nano.optim.lr, nano.training.precision) == (4e-3, "fp32")
    assert (nano.training.batch_tokens, nano.training.threads) == (1024, 1)
    assert nano.training.steps == 10 * nano.optim.warmup_steps
    assert nano.training.steps % nano.evaluation.every_steps == 0  # the curve ends with the final loss
    assert (nano.scale.smallest_effect, nano.scale.caveat) == (0.05, "early training: sign only")
    assert long.scale.caveat is None and long.model == nano.model and long.optim == nano.optim
    assert 3.2e6 < long.training.steps * long.training.batch_tokens < 3.4e6


def test_small_presets_stay_within_as_many_passes_over_the_corpus_as_they_say() -> None:
    for name, tokens in CORPUS_TOKENS.items():
        training = load_config(name).training
        assert training.steps * training.batch_tokens <= (4 if name == "mini" else 1) * tokens


def test_mini_lies_between_micro_and_124m() -> None:
    config = load_config("mini")
    assert parameters(config) == 33_870_848
    assert config.model.block_size == 512 and config.data.tokenizer.options == {"vocab_size": config.model.vocab_size}
    assert 99.9e6 < config.training.steps * config.training.batch_tokens < 100.1e6
    assert 0.005 < config.scale.smallest_effect < load_config("micro").scale.smallest_effect


def test_micro_gives_the_embedding_a_share_that_means_something() -> None:
    config = load_config("micro")
    assert 0.12 < config.model.vocab_size * config.model.n_embd / parameters(config) < 0.14
    assert config.scale.smallest_effect == 0.02 and config.data.tokenizer.options == {"vocab_size": 4096}
