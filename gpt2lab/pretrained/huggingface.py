"""GPT-2 in Hugging Face's layout: a folder, a `GPT2LMHeadModel`, or a name on the hub."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from gpt2lab.data.tokenizers import SEPARATOR_TEXT, gpt2_files
from gpt2lab.errors import ConfigError
from gpt2lab.model import GPT
from gpt2lab.pretrained.files import PICKLED, SAFETENSORS, on_cpu, read_settings, read_weights, replacing
from gpt2lab.pretrained.hub import fetched
from gpt2lab.pretrained.names import HUGGING_FACE, fill, to_hf
from gpt2lab.pretrained.nanogpt import load_nanogpt
from gpt2lab.pretrained.settings import GPT2_VOCABULARIES, config_of, misfits, settings_of
from gpt2lab.training.state import weights_of

HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json")
WRITTEN = ("config.json", "generation_config.json", SAFETENSORS, *TOKENIZER_FILES)
BESIDE = (
    "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "README.md", ".gitattributes", PICKLED,
)  # fmt: skip
"""What others put into such a folder; one that holds these is still one that a save may replace."""


def load_gpt2(source: Any) -> GPT:
    """The assembly and weights of `source`, in evaluation mode: a folder in Hugging Face's layout, a nanoGPT
    checkpoint, a `GPT2LMHeadModel`, or a name on the hub, when the network allows.

    Raises ConfigError when there is no such thing, or when weights or settings do not fit, with every difference;
    DataFault when a file is damaged; EnvironmentFault when the hub cannot be reached.
    """
    if isinstance(source, (str, Path)):
        path = Path(source)
        if path.is_file():
            return load_nanogpt(path)
        if not path.is_dir():
            if not HUB_NAME.fullmatch(str(source)):
                raise ConfigError("there is no such folder", where=str(source), hint="a folder with config.json")
            path = fetched(str(source))
        if not (path / "config.json").exists() and (path / "gpt2lab.json").exists():
            raise ConfigError("a model in our own layout", where=str(source), hint="gpt2lab.load_model reads it")
        settings, weights = read_settings(path), read_weights(path)
        return _filled(settings, weights, str(source), str(path / "config.json"))
    if not callable(getattr(source, "state_dict", None)) or not hasattr(source, "config"):
        raise ConfigError(f"a {type(source).__name__} is no GPT-2", hint="a folder, a GPT2LMHeadModel, or a hub name")
    name = type(source).__name__
    return _filled(source.config.to_dict(), source.state_dict(), name, f"{name}.config")


def save_gpt2(model: GPT, path: str | Path, *, gpt2_tokenizer: bool | None = None) -> Path:
    """Write a folder that `transformers` loads by AutoModelForCausalLM and, where it has GPT-2's tokenizer, by
    AutoTokenizer. An older folder of weights is replaced in one piece. Biases that the assembly lacks become zeros.

    gpt2_tokenizer: whether the tokenizer's files go with it; None decides by the size of the vocabulary.

    Raises ConfigError with every slot that the layout cannot express (`save_model` writes any assembly), or when the
    folder holds other files; EnvironmentFault when it cannot be written.
    """
    config = model.config
    problems = misfits(config)
    if problems:
        raise ConfigError(problems, hint="gpt2lab.save_model, or gpt2lab export --layout gpt2lab: any assembly")
    settings = settings_of(config)
    own = weights_of(model)
    weights = to_hf(on_cpu({**own, **_absent_biases(model, own)}))
    with_tokenizer = config.vocab_size in GPT2_VOCABULARIES if gpt2_tokenizer is None else gpt2_tokenizer
    if not with_tokenizer:
        settings |= {"bos_token_id": None, "eos_token_id": None}
    with replacing(path, (*WRITTEN, *BESIDE)) as folder:
        save_file(weights, folder / SAFETENSORS, metadata={"format": "pt"})
        _write(folder / "config.json", settings)
        ids = {key: settings[key] for key in ("bos_token_id", "eos_token_id") if settings[key] is not None}
        _write(folder / "generation_config.json", {"_from_model_config": True, **ids})
        if with_tokenizer:
            _write_tokenizer(folder, config.block_size)
    return Path(path)


def has_gpt2_tokenizer(path: Path, vocab_size: int) -> bool:
    """Whether texts for this model are to be cut by GPT-2's tokenizer: its vocabulary has that size, and the folder
    brings no other one of its own."""
    if vocab_size not in GPT2_VOCABULARIES:
        return False
    found = _vocabulary(path)
    return found is None or found == json.loads(gpt2_files()["encoder.json"].read_bytes())


def _vocabulary(path: Path) -> Any:
    """Token -> id, as far as the folder tells."""
    try:
        if (path / "vocab.json").is_file():
            return json.loads((path / "vocab.json").read_bytes())
        if (path / "tokenizer.json").is_file():
            whole = json.loads((path / "tokenizer.json").read_bytes())
            added = {token["content"]: token["id"] for token in whole.get("added_tokens", ())}
            return {**whole["model"]["vocab"], **added}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # something else
    return None


def _filled(settings: Mapping[str, Any], weights: Mapping[str, Tensor], where: str, settings_where: str) -> GPT:
    model = GPT(config_of(settings, settings_where))
    fill(model, weights, HUGGING_FACE, where)
    return model.eval()


def _absent_biases(model: GPT, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Zeros for every bias of GPT-2 that this assembly does without."""
    with torch.device("meta"):
        whole = GPT(model.config.model_copy(update={"bias": True}))
    return {name: torch.zeros(tensor.shape) for name, tensor in weights_of(whole).items() if name not in own}


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
