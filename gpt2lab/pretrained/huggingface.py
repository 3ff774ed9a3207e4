"""GPT-2 in the formats of other projects: Hugging Face's layout (a folder, a `GPT2LMHeadModel`, or a name on the hub),
read and written, and checkpoints of nanoGPT and build-nanogpt, read.

Names of weights are the same on all sides. Hugging Face's linear layers in blocks store (in, out), ours and nanoGPT's
(as torch's) (out, in); both others put the prefix `transformer.` before all but the head.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt2lab.data.tokenizers import GPT2_SIZE, SEPARATOR_TEXT, gpt2_files
from gpt2lab.errors import ConfigError, DataFault, Problem
from gpt2lab.model import GPT, ModelConfig
from gpt2lab.pretrained.files import (
    PICKLED,
    SAFETENSORS,
    PickledConfig,
    fetched,
    on_cpu,
    read_settings,
    read_tensors,
    read_weights,
    replacing,
    unpickled,
)
from gpt2lab.registry import SLOTS, Choice
from gpt2lab.training.checkpoints import save_tensors
from gpt2lab.training.state import canonical, weights_of

HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json")
OUR_FILES = ("config.json", "generation_config.json", SAFETENSORS, *TOKENIZER_FILES)
OTHER_FILES = (
    "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "README.md", ".gitattributes", PICKLED,
)  # fmt: skip
"""Other files that such folders usually contain, and that a save may replace."""
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
NOT_WEIGHTS = (".attn.bias", ".attn.masked_bias")  # causal masks that old files store among the weights
PREFIX = "transformer."
HEAD, TABLE = "lm_head.weight", "wte.weight"
SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
ACTIVATIONS = {
    "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_python_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh", "gelu": "gelu", "gelu_python": "gelu",
    "relu2": "relu2",
}  # fmt: skip
ACTIVATION_NAMES = {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu": "relu", "silu": "silu", "relu2": "relu2"}
DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
DEFAULTS: dict[str, Any] = {  # of transformers' GPT2Config, for missing keys
    "vocab_size": 50257, "n_layer": 12, "n_head": 12, "n_embd": 768, "n_inner": None,
    "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False, "tie_word_embeddings": True,
    **dict.fromkeys(DROPOUTS, 0.1),
}  # fmt: skip
CAN: dict[str, dict[str, tuple[str, ...]]] = {
    "position": {"learned": ()}, "norm": {"layernorm": ("eps", "bias")}, "residual": {"pre": ()},
    "attention": {"mha": ()}, "mask": {"causal": ()}, "scores": {"plain": ("scale",)},
    "mlp": dict.fromkeys(ACTIVATION_NAMES, ()), "linear": {"plain": ()}, "embedding": {"plain": ()}, "stack": {},
    "head": {"tied": (), "untied": ("zero_init",)}, "parametrization": {"standard": ()},
}  # fmt: skip
"""Slot -> component -> options that Hugging Face's GPT-2 can express. Other slots do not affect outputs."""
PADDED = 50304  # GPT-2's vocabulary, padded to a multiple of 128 as nanoGPT does
GPT2_VOCABULARIES = (GPT2_SIZE, PADDED)


def load_gpt2(source: Any) -> GPT:
    """The assembly and weights of `source`, in evaluation mode: a folder in Hugging Face's layout or its weights alone
    (.safetensors), a checkpoint of nanoGPT or build-nanogpt, a `GPT2LMHeadModel`, or a name on the hub.

    Raises ConfigError when there is no such thing, or when weights or settings do not fit, with every difference;
    DataFault when a file is damaged; EnvironmentFault when the hub cannot be reached.
    """
    if isinstance(source, (str, Path)):
        path = Path(source)
        if path.is_file():
            return _of_weights(path) if path.suffix == ".safetensors" else load_nanogpt(path)
        if not path.is_dir():
            if not HUB_NAME.fullmatch(str(source)):
                raise ConfigError("there is no such folder", where=str(source), hint="a folder with config.json")
            path = fetched(str(source))
        if not (path / "config.json").exists() and (path / "gpt2lab.json").exists():
            raise ConfigError("a model in gpt2lab's layout", where=str(source), hint="gpt2lab.load_model reads it")
        settings, weights = read_settings(path), read_weights(path)
        return _filled(settings, weights, str(source), str(path / "config.json"))
    if not callable(getattr(source, "state_dict", None)) or not hasattr(source, "config"):
        raise ConfigError(f"a {type(source).__name__} is no GPT-2", hint="a folder, a GPT2LMHeadModel, or a hub name")
    name = type(source).__name__
    return _filled(source.config.to_dict(), source.state_dict(), name, f"{name}.config")


def save_gpt2(model: GPT, path: str | Path, *, gpt2_tokenizer: bool | None = None) -> Path:
    """Write a folder that `transformers` loads by AutoModelForCausalLM and, where it has GPT-2's tokenizer, by
    AutoTokenizer. An older folder of weights is replaced atomically. Biases that the assembly lacks become zeros.

    gpt2_tokenizer: whether the tokenizer's files go with it; None decides by the size of the vocabulary.

    Raises ConfigError with every slot that the layout cannot express (`save_model` writes any assembly), or when the
    folder holds other files; EnvironmentFault when it cannot be written.
    """
    config = model.config
    problems = misfits(config)
    if problems:
        raise ConfigError(problems, hint="gpt2lab.save_model, or gpt2lab export --layout gpt2lab: any assembly")
    settings = settings_of(config)
    # terms of the objective may have weights, and shape no output
    weights = {name: tensor for name, tensor in weights_of(model).items() if not name.startswith("terms.")}
    weights = to_hf(on_cpu({**weights, **_absent_biases(model, weights)}))
    with_tokenizer = config.vocab_size in GPT2_VOCABULARIES if gpt2_tokenizer is None else gpt2_tokenizer
    if not with_tokenizer:
        settings |= {"bos_token_id": None, "eos_token_id": None}
    with replacing(path, (*OUR_FILES, *OTHER_FILES)) as folder:
        save_tensors(weights, folder / SAFETENSORS)
        _write(folder / "config.json", settings)
        ids = {key: settings[key] for key in ("bos_token_id", "eos_token_id") if settings[key] is not None}
        _write(folder / "generation_config.json", {"_from_model_config": True, **ids})
        if with_tokenizer:
            _write_tokenizer(folder, config.block_size)
    return Path(path)


def has_gpt2_tokenizer(path: Path, vocab_size: int) -> bool:
    """Whether the model of a file or folder uses GPT-2's tokenizer: its vocabulary has that size, and the folder holds
    no other one."""
    if vocab_size not in GPT2_VOCABULARIES:
        return False
    vocabulary = _vocabulary(path if path.is_dir() else path.parent)
    return vocabulary is None or vocabulary == json.loads(gpt2_files()["encoder.json"].read_bytes())


def _vocabulary(path: Path) -> Any:
    """Token -> id, from the folder's files; None without any."""
    try:
        if (path / "vocab.json").is_file():
            return json.loads((path / "vocab.json").read_bytes())
        if (path / "tokenizer.json").is_file():
            whole = json.loads((path / "tokenizer.json").read_bytes())
            added = {token["content"]: token["id"] for token in whole.get("added_tokens", ())}
            return {**whole["model"]["vocab"], **added}
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return {}  # something else
    return None


def _filled(settings: Mapping[str, Any], weights: Mapping[str, Tensor], where: str, settings_where: str) -> GPT:
    config = config_of(settings, settings_where)
    refuse_larger(config, weights, where)
    model = GPT(config)
    fill(model, weights, where)
    return model.eval()


def _of_weights(file: Path) -> GPT:
    """A GPT-2 from a file of weights; settings from config.json beside it, else from the shapes."""
    weights, settings = read_tensors(file), file.parent / "config.json"
    if settings.is_file():
        return _filled(read_settings(file.parent), weights, str(file), str(settings))
    return _filled(shaped_settings(weights, str(file)), weights, str(file), str(file))


def shaped_settings(weights: Mapping[str, Tensor], where: str) -> dict[str, Any]:
    """The config.json that fits the shapes of `weights`, with heads of 64 channels, as all of OpenAI's models have.

    Raises ConfigError for what is no GPT-2, or has another width or orientation.
    """
    tensors, hint = plain_names(weights), "the config.json that these weights came with, in the same folder"
    table, places, inner, qkv = (
        tensors.get(name)
        for name in (TABLE if TABLE in tensors else HEAD, "wpe.weight", "h.0.mlp.c_fc.weight", "h.0.attn.c_attn.weight")
    )
    if (
        table is None
        or places is None
        or inner is None
        or qkv is None
        or not table.ndim == places.ndim == inner.ndim == 2
    ):
        raise ConfigError("no weights of a GPT-2 by their names", where=where, hint="a GPT-2 in Hugging Face's layout")
    C = table.shape[1]
    if C % 64:
        raise ConfigError(
            f"{C} channels are no multiple of 64: the number of heads is not known", where=where, hint=hint
        )
    if tuple(qkv.shape) != (C, 3 * C):
        problem = f"linear layers are (out, in) as in nanoGPT ({tuple(qkv.shape)}), and the activation is not known"
        raise ConfigError(problem, where=where, hint="the checkpoint that they came from (.pt)")
    return {
        "n_layer": len({name.split(".")[1] for name in tensors if name.startswith("h.")}),
        "n_head": C // 64, "n_embd": C, "n_inner": inner.shape[1],
        "vocab_size": table.shape[0], "n_positions": places.shape[0],
        "tie_word_embeddings": TABLE not in tensors or HEAD not in tensors or _same(tensors[HEAD], table),
    }  # fmt: skip


def _absent_biases(model: GPT, present: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Zeros for every bias of GPT-2 that this assembly lacks."""
    with torch.device("meta"):
        whole = GPT(model.config.model_copy(update={"bias": True}))
    return {name: torch.zeros(tensor.shape) for name, tensor in weights_of(whole).items() if name not in present}


def _write_tokenizer(folder: Path, context: int) -> None:
    """GPT-2's vocabulary and merges under the names that transformers gives them."""
    files = gpt2_files()
    shutil.copyfile(files["encoder.json"], folder / "vocab.json")
    shutil.copyfile(files["vocab.bpe"], folder / "merges.txt")
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), SEPARATOR_TEXT)
    _write(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False, "model_max_length": context, **special},
    )


def _write(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load_nanogpt(path: str | Path) -> GPT:
    """The model of a checkpoint that nanoGPT (`ckpt.pt`) or build-nanogpt (`model_05000.pt`) wrote, in evaluation mode.
    Optimizer and training settings in it are ignored. A padded vocabulary keeps its rows, since their softmax includes
    them.

    Source: karpathy/nanoGPT, model.py and train.py, whose MLP uses torch's GELU without approximation; and
    karpathy/build-nanogpt, train_gpt2.py, whose MLP uses the one by tanh. Raises ConfigError when it is no such
    checkpoint or weights do not fit, DataFault when it cannot be read.
    """
    file = Path(path)
    saved = unpickled(file)
    saved = saved if isinstance(saved, Mapping) else {}
    built = isinstance(saved.get("config"), PickledConfig)
    key = "config" if built else "model_args"
    args = vars(saved["config"]) if built else saved.get(key)
    if not isinstance(saved.get("model"), Mapping) or not isinstance(args, Mapping):
        problem = "no checkpoint of nanoGPT or build-nanogpt: model is expected in it, with model_args or config"
        raise ConfigError(problem, where=str(path), hint="docs/weights.md")
    missing = [name for name in SIZES if not isinstance(args.get(name), int) or args[name] < 1]
    if missing:
        raise DataFault(f"{key} lacks {', '.join(missing)}", where=str(path))
    config = ModelConfig(
        **{key: args[key] for key in SIZES},
        bias=bool(args.get("bias", True)),  # checkpoints from before it was an option have biases
        dropout=float(args.get("dropout", 0.0)),
        mlp="gelu_tanh" if built else "gelu",
    )
    refuse_larger(config, saved["model"], str(path))
    model = GPT(config)
    fill(model, saved["model"], str(path), transposed=False)
    return model.eval()


# --- weights ---


def turned(name: str, tensor: Tensor) -> Tensor:
    """A tensor of Hugging Face's in our orientation, or the reverse."""
    return tensor.t() if name.endswith(TRANSPOSED) else tensor


def plain_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without prefixes, those of wrappers too, and without masks stored among the weights."""
    named = canonical(weights).items()
    return {name.removeprefix(PREFIX): tensor for name, tensor in named if not name.endswith(NOT_WEIGHTS)}


def from_hf(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face names and shapes -> ours. A head tied to the embedding is dropped, as ours has none."""
    tensors = _with_table(plain_names(weights))
    return {name: turned(name, tensor).contiguous() for name, tensor in tensors.items() if name != HEAD}


def _with_table(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """With the embedding under its own name: of a tied pair, safetensors' save_model keeps the head's name only."""
    return tensors if TABLE in tensors or HEAD not in tensors else {**tensors, TABLE: tensors[HEAD]}


def to_hf(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Ours -> Hugging Face names and shapes, without a tied head, as their own files are."""
    return {
        name if name == HEAD else PREFIX + name: turned(name, tensor).contiguous() for name, tensor in weights.items()
    }


def refuse_larger(config: ModelConfig, weights: Mapping[str, Tensor], where: str) -> None:
    """Raises ConfigError for settings of a GPT-2 far larger than its weights, before memory is taken for it."""
    C = config.n_embd
    block = max(1000, round((4 + 2 * config.mlp_ratio) * C * C))
    wanted = config.n_layer * block + (config.vocab_size + config.block_size) * C
    present = sum(tensor.numel() for tensor in weights.values() if isinstance(tensor, Tensor))
    if wanted > 4 * present + 1_000_000:
        what = f"the settings describe about {wanted:.3g} parameters, the weights have {present:.3g}"
        raise ConfigError(what, where=where, hint="the settings that these weights came with")


def fill(model: GPT, weights: Mapping[str, Tensor], where: str, *, transposed: bool = True) -> None:
    """Copy `weights` into the model. transposed: whether linear layers in blocks are (in, out), as Hugging Face's.
    Raises ConfigError with every name and shape that does not fit, and then changes nothing."""
    turn = turned if transposed else lambda name, tensor: tensor
    parameters, tensors = weights_of(model), plain_names(weights)
    problems = []
    if HEAD not in parameters and HEAD in tensors:
        tensors = _with_table(tensors)
        head = tensors.pop(HEAD)
        if TABLE in tensors and not _same(head, tensors[TABLE]):
            problems.append(Problem(HEAD, f"differs from {TABLE}, to which the settings tie it"))
    shapes = {name: tuple(turn(name, tensor).shape) for name, tensor in parameters.items()}
    problems += differences(shapes, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    problems += [
        Problem(name, f"{str(tensor.dtype).removeprefix('torch.')}: only floating-point weights are read")
        for name, tensor in tensors.items()
        if not tensor.is_floating_point()
    ]
    if problems:
        what = f"the weights are not those that its settings describe ({len(problems)} differences)"
        raise ConfigError([Problem(where, what), *problems], hint="the config.json that these weights came with")
    with torch.no_grad():
        for name, tensor in parameters.items():
            tensor.copy_(turn(name, tensors[name]))


def differences(expected: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]]) -> list[Problem]:
    """Every name that is missing, unexpected, or has another shape."""
    missing = [Problem(name, f"missing: {shape} is wanted") for name, shape in expected.items() if name not in shapes]
    known = {name: shape for name, shape in shapes.items() if name in expected}
    return [
        *missing,
        *(Problem(name, f"unexpected: {shape} found") for name, shape in shapes.items() if name not in known),
        *(Problem(name, f"{expected[name]} is wanted, {s} found") for name, s in known.items() if expected[name] != s),
    ]


def _same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() or (a.shape == b.shape and bool((a == b).all()))


# --- settings ---


def config_of(settings: Mapping[str, Any], where: str) -> ModelConfig:
    """The assembly that a config.json describes. Raises ConfigError with every setting that we cannot express."""
    kind = settings.get("model_type", "gpt2")
    if kind != "gpt2":
        raise ConfigError(f"a model of type '{kind}', not gpt2", where=where, hint="a GPT-2 is expected")
    merged = {**DEFAULTS, **settings}
    merged.setdefault("n_positions", merged.get("n_ctx", 1024))
    problems = [
        Problem(where, f"{key} is {merged[key]!r}: a whole number above 0 is expected")
        for key in ("vocab_size", "n_layer", "n_head", "n_embd", "n_positions")
        if not isinstance(merged[key], int) or isinstance(merged[key], bool) or merged[key] < 1
    ]
    if not problems and merged["n_embd"] % merged["n_head"]:
        problems.append(Problem(where, f"n_embd {merged['n_embd']} is no multiple of n_head {merged['n_head']}"))
    activation = merged["activation_function"]
    if activation not in ACTIVATIONS:
        activations = ", ".join(ACTIVATIONS)
        problems.append(Problem(where, f"activation_function '{activation}': only {activations} have a component here"))
    if merged["add_cross_attention"]:
        problems.append(Problem(where, "add_cross_attention: a decoder by itself is all that there is here"))
    dropouts = [merged[key] for key in DROPOUTS]
    if len(set(dropouts)) > 1:
        unequal = ", ".join(f"{key} {value}" for key, value in zip(DROPOUTS, dropouts, strict=True))
        problems.append(
            Problem(where, f"{unequal}: there is one dropout here. It matters in training only: make them equal")
        )
    if problems:
        raise ConfigError(problems, hint="docs/weights.md")
    norm: dict[str, Any] = {"name": "layernorm", "eps": float(merged["layer_norm_epsilon"])}
    return ModelConfig(
        n_layer=merged["n_layer"],
        n_head=merged["n_head"],
        n_embd=merged["n_embd"],
        block_size=merged["n_positions"],
        vocab_size=merged["vocab_size"],
        dropout=float(dropouts[0]),
        mlp_ratio=(merged["n_inner"] or 4 * merged["n_embd"]) / merged["n_embd"],
        mlp=ACTIVATIONS[activation],
        norm=norm,
        scores=_scores(merged),
        head="tied" if merged["tie_word_embeddings"] else "untied",
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
        "activation_function": ACTIVATION_NAMES[mlp.name],
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
    """Why Hugging Face's GPT-2 cannot express this assembly, by slot; empty where it can."""
    problems = []
    for slot, supported in CAN.items():
        path = SLOTS[slot].path
        choices = list(dict.fromkeys(config.choices()[slot]))
        for choice in choices:
            problems += [Problem(path, what) for what in _unknown(choice, supported)]
        if len(choices) > 1 and slot != "scores" and not any(problem.where == path for problem in problems):
            several = ", ".join(map(str, choices))
            problems.append(Problem(path, f"{several}: Hugging Face's GPT-2 is alike in all layers"))
    if not problems and scaling(config) is None:
        what = f"{', '.join(map(str, config.scores))}: Hugging Face's GPT-2 knows 1/sqrt(D), 1, and each over its layer"
        problems.append(Problem(SLOTS["scores"].path, what))
    return problems


def scaling(config: ModelConfig) -> tuple[bool, bool] | None:
    """(whether scores are divided by sqrt(D), whether by the layer's number); None for other scales."""
    root = config.head_size**-0.5
    pattern = [choice.options["scale"] for choice in config.scores]
    cycle = [root if scale is None else scale for scale in pattern]
    scales = [cycle[layer % len(cycle)] for layer in range(config.n_layer)]
    for divided in (True, False):
        for inverse in (False, True):
            expected = [(root if divided else 1.0) / (layer + 1 if inverse else 1) for layer in range(config.n_layer)]
            if all(map(math.isclose, scales, expected)):
                return divided, inverse
    return None


def _scores(merged: Mapping[str, Any]) -> Any:
    """The factor on the scores of every layer."""
    root = (merged["n_embd"] / merged["n_head"]) ** -0.5 if merged["scale_attn_weights"] else 1.0
    if merged["scale_attn_by_inverse_layer_idx"]:
        return [{"name": "plain", "scale": root / (layer + 1)} for layer in range(merged["n_layer"])]
    return "plain" if merged["scale_attn_weights"] else {"name": "plain", "scale": root}


def _unknown(choice: Choice, supported: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Properties of a choice that Hugging Face's GPT-2 cannot express."""
    if choice.name not in supported:
        can = f"has {' or '.join(supported)} only" if supported else "has nothing of the kind"
        return [f"{choice.name}: Hugging Face's GPT-2 {can}"]
    defaults = SLOTS[choice.slot][choice.name].defaults()
    return [
        f"{choice.name} with {option} {value}: Hugging Face's GPT-2 has no such option"
        for option, value in choice.options.items()
        if option not in supported[choice.name] and value != defaults[option]
    ]
