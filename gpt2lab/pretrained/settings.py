"""What Hugging Face's config.json of a GPT-2 says, as our settings, and back: where the two can say the same."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from gpt2lab.data.tokenizers import GPT2_SIZE
from gpt2lab.errors import ConfigError, Problem
from gpt2lab.model import ModelConfig
from gpt2lab.registry import SLOTS, Choice

ACTIVATIONS = {
    "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_python_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh", "gelu": "gelu", "gelu_python": "gelu",
    "relu2": "relu2",
}  # fmt: skip
WRITTEN = {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu2": "relu2"}
DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
DEFAULTS: dict[str, Any] = {  # of transformers' GPT2Config, for what a file leaves out
    "vocab_size": 50257, "n_layer": 12, "n_head": 12, "n_embd": 768, "n_inner": None,
    "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False, "tie_word_embeddings": True,
    **dict.fromkeys(DROPOUTS, 0.1),
}  # fmt: skip
CAN: dict[str, dict[str, tuple[str, ...]]] = {
    "position": {"learned": ()}, "norm": {"layernorm": ("eps", "bias")}, "residual": {"pre": ()},
    "attention": {"mha": ()}, "mask": {"causal": ()}, "scores": {"plain": ("scale",)},
    "mlp": dict.fromkeys(WRITTEN, ()), "embedding": {"plain": ()}, "stack": {},
    "head": {"tied": (), "untied": ("zero_init",)}, "parametrization": {"standard": ()},
}  # fmt: skip
"""Slot -> component -> options, as far as Hugging Face's GPT-2 can express them. Other slots shape no output."""
PADDED = 50304  # GPT-2's vocabulary, padded to a multiple of 128 as nanoGPT does
GPT2_VOCABULARIES = (GPT2_SIZE, PADDED)


def config_of(settings: Mapping[str, Any], where: str) -> ModelConfig:
    """The assembly that a config.json describes. Raises ConfigError with all that we cannot express."""
    kind = settings.get("model_type", "gpt2")
    if kind != "gpt2":
        raise ConfigError(f"a model of type '{kind}', not gpt2", where=where, hint="a GPT-2 is expected")
    said = {**DEFAULTS, **settings}
    said.setdefault("n_positions", said.get("n_ctx", 1024))
    problems = [
        Problem(where, f"{key} is {said[key]!r}: a whole number above 0 is expected")
        for key in ("vocab_size", "n_layer", "n_head", "n_embd", "n_positions")
        if not isinstance(said[key], int) or isinstance(said[key], bool) or said[key] < 1
    ]
    if not problems and said["n_embd"] % said["n_head"]:
        problems.append(Problem(where, f"n_embd {said['n_embd']} is no multiple of n_head {said['n_head']}"))
    activation = said["activation_function"]
    if activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        problems.append(Problem(where, f"activation_function '{activation}': only {known} have a component here"))
    if said["add_cross_attention"]:
        problems.append(Problem(where, "add_cross_attention: a decoder by itself is all that there is here"))
    dropouts = [said[key] for key in DROPOUTS]
    if len(set(dropouts)) > 1:
        told = ", ".join(f"{key} {value}" for key, value in zip(DROPOUTS, dropouts, strict=True))
        problems.append(
            Problem(where, f"{told}: there is one dropout here. It matters in training only: make them equal")
        )
    if problems:
        raise ConfigError(problems, hint="docs/weights.md")
    norm: dict[str, Any] = {"name": "layernorm", "eps": float(said["layer_norm_epsilon"])}
    return ModelConfig(
        n_layer=said["n_layer"],
        n_head=said["n_head"],
        n_embd=said["n_embd"],
        block_size=said["n_positions"],
        vocab_size=said["vocab_size"],
        dropout=float(dropouts[0]),
        mlp_ratio=(said["n_inner"] or 4 * said["n_embd"]) / said["n_embd"],
        mlp=ACTIVATIONS[activation],
        norm=norm,
        scores=_scores(said),
        head="tied" if said["tie_word_embeddings"] else "untied",
    )


def settings_of(config: ModelConfig) -> dict[str, Any]:
    """config.json for an assembly without `misfits`."""
    (norm,) = set(config.norm)
    (mlp,) = set(config.mlp)
    root, inverse = scaling(config) or (True, False)
    inner = round(config.mlp_ratio * config.n_embd)
    separator = GPT2_SIZE - 1 if config.vocab_size in GPT2_VOCABULARIES else None
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": WRITTEN[mlp.name],
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "n_inner": None if inner == 4 * config.n_embd else inner,
        "n_positions": config.block_size,
        "n_ctx": config.block_size,
        "vocab_size": config.vocab_size,
        "layer_norm_epsilon": norm.options["eps"],
        "scale_attn_weights": root,
        "scale_attn_by_inverse_layer_idx": inverse,
        "tie_word_embeddings": config.head.name == "tied",
        **dict.fromkeys(DROPOUTS, config.dropout),
        "bos_token_id": separator,
        "eos_token_id": separator,
        "dtype": "float32",
    }


def misfits(config: ModelConfig) -> list[Problem]:
    """Why Hugging Face's GPT-2 cannot hold this assembly, slot by slot; nothing where it can."""
    problems = []
    for slot, known in CAN.items():
        path = SLOTS[slot].path
        choices = list(dict.fromkeys(config.choices()[slot]))
        for choice in choices:
            problems += [Problem(path, what) for what in _unknown(choice, known)]
        if len(choices) > 1 and slot != "scores" and not any(problem.where == path for problem in problems):
            told = ", ".join(map(str, choices))
            problems.append(Problem(path, f"{told}: Hugging Face's GPT-2 is alike in all layers"))
    if not problems and scaling(config) is None:
        what = f"{', '.join(map(str, config.scores))}: Hugging Face's GPT-2 knows 1/sqrt(D), 1, and each over its layer"
        problems.append(Problem(SLOTS["scores"].path, what))
    return problems


def scaling(config: ModelConfig) -> tuple[bool, bool] | None:
    """(whether scores are divided by sqrt(D), whether by the number of their layer); None when by something else."""
    root = config.head_size**-0.5
    pattern = [choice.options["scale"] for choice in config.scores]
    found = [root if scale is None else scale for scale in pattern]
    scales = [found[layer % len(found)] for layer in range(config.n_layer)]
    for divided in (True, False):
        for inverse in (False, True):
            expected = [(root if divided else 1.0) / (layer + 1 if inverse else 1) for layer in range(config.n_layer)]
            if all(map(math.isclose, scales, expected)):
                return divided, inverse
    return None


def _scores(said: Mapping[str, Any]) -> Any:
    """The factor on the scores of every layer."""
    root = (said["n_embd"] / said["n_head"]) ** -0.5 if said["scale_attn_weights"] else 1.0
    if said["scale_attn_by_inverse_layer_idx"]:
        return [{"name": "plain", "scale": root / (layer + 1)} for layer in range(said["n_layer"])]
    return "plain" if said["scale_attn_weights"] else {"name": "plain", "scale": root}


def _unknown(choice: Choice, known: Mapping[str, tuple[str, ...]]) -> list[str]:
    """What a choice is that Hugging Face's GPT-2 is not."""
    if choice.name not in known:
        can = f"has {' or '.join(known)} only" if known else "has nothing of the kind"
        return [f"{choice.name}: Hugging Face's GPT-2 {can}"]
    defaults = SLOTS[choice.slot][choice.name].defaults()
    return [
        f"{choice.name} with {option} {value}: Hugging Face's GPT-2 has no such option"
        for option, value in choice.options.items()
        if option not in known[choice.name] and value != defaults[option]
    ]
