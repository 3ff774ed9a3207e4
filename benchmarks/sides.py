"""What is measured: each side holds a model in training and takes steps on the same batches.

Our side is the real engine. The others are written as their own code trains: whole scores, AdamW as torch has it by
default, the loss read at every step. All of them start from equal weights, clip at 1, and keep one rate.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.plain import PlainGPT, adamw
from gpt2lab.components.base import Param, Role
from gpt2lab.data.batches import Batches
from gpt2lab.data.files import data_home
from gpt2lab.errors import ConfigError, EnvironmentFault, unknown
from gpt2lab.model import MODEL_SLOTS, ModelConfig, build_model
from gpt2lab.optim.groups import OptimConfig, build_optimizers
from gpt2lab.pretrained.huggingface import from_hf, to_hf
from gpt2lab.registry import SLOTS, Choice
from gpt2lab.testing import placed
from gpt2lab.training.compiling import compiled
from gpt2lab.training.loop import StepRecord, steps
from gpt2lab.training.precision import AUTOCAST, Precision, autocast, loss_scaler
from gpt2lab.training.settings import TrainingConfig
from gpt2lab.training.state import TrainState

LR, WEIGHT_DECAY, CLIP = 1e-3, 0.1, 1.0
NEVER_ENDING = 10**9
OTHERS = ("plain", "engine", "nanogpt=PATH", "transformers")
DIFFERENT_STEPS = 20
"""Steps until the random tokens come again."""


@dataclass(frozen=True)
class Work:
    """A model's sizes and its batch: what one training step has to do. sequences: in a batch.  choice: a component and
    its options, in place of canonical GPT-2's."""

    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    sequences: int
    vocab_size: int
    bias: bool = False
    choice: Choice | None = None

    @property
    def tokens(self) -> int:
        """Of one step."""
        return self.sequences * self.block_size

    def model(self) -> ModelConfig:
        """As our config."""
        return ModelConfig(
            n_layer=self.n_layer,
            n_head=self.n_head,
            n_embd=self.n_embd,
            block_size=self.block_size,
            vocab_size=self.vocab_size,
            bias=self.bias,
            **({self.choice.slot: placed(self.choice)} if in_model(self.choice) else {}),
        )

    def batches(self, seed: int = 0) -> Batches:
        """Batches of random tokens; the same for equal work."""
        tokens = np.random.default_rng(seed).integers(0, self.vocab_size, DIFFERENT_STEPS * self.tokens + 1)
        return Batches(tokens, self.block_size, self.sequences, seed)


def in_model(choice: Choice | None) -> TypeGuard[Choice]:
    """Whether it is a component of the model, and not of the optimizer or of nothing."""
    return choice is not None and choice.slot in MODEL_SLOTS


WORKS = {
    "a": Work(4, 4, 128, 64, 12, 65),
    "nano": Work(4, 4, 128, 128, 8, 256, bias=True),
    "b256": Work(6, 6, 384, 256, 8, 256),
    "b50k": Work(6, 6, 384, 256, 8, 50_304),
    "c": Work(12, 12, 768, 1024, 1, 50_304),
    "d": Work(12, 12, 768, 1024, 32, 50_304),
}
"""nanoGPT's example for a CPU; our demo scale; a small model with a vocabulary of bytes, and with GPT-2's; GPT-2 124M,
with a batch of one sequence and of as many as keep a GPU busy."""


def work_named(name: str) -> Work:
    """Raises ConfigError."""
    if name not in WORKS:
        raise ConfigError(unknown("configuration", name, WORKS), where="--config")
    return WORKS[name]


def work_against(vs: str, config: str) -> Work:
    """That configuration with what the other side has no choice in, so that both compute the same: transformers knows
    no GPT-2 without biases, and nanoGPT's GELU is the exact one. Raises ConfigError."""
    work, kind = work_named(config), vs.partition("=")[0]
    return replace(work, bias=work.bias or kind == "transformers",
                   choice=SLOTS["mlp"].read("gelu") if kind == "nanogpt" else work.choice)  # fmt: skip


class Side(Protocol):
    """A model at work. name: as shown.  precision: of its matrix products."""

    name: str
    precision: Precision

    def step(self) -> float:
        """What is timed, once; -> what it computed, as a number: a training step its loss in nats."""
        ...


def other_side(name: str) -> tuple[str, str]:
    """What `--vs` names: plain, engine (the plain model in our training loop), transformers or nanogpt, and the path of
    nanoGPT's checkout. Raises ConfigError."""
    kind, _, path = name.partition("=")
    if name not in ("plain", "engine", "transformers") and kind != "nanogpt":
        raise ConfigError(unknown("side", name, OTHERS), where="--vs")
    return kind, path or "."


def initial_weights(work: Work) -> dict[str, Tensor]:
    """What every side starts from, under our names."""
    return dict(build_model(work.model(), seed=0).state_dict())


class Engine:
    """Our own training step, through the loop that runs are trained by. plain: with the plain model in it."""

    def __init__(
        self, work: Work, precision: Precision, device: torch.device, *, plain: bool = False, compile: bool = False
    ) -> None:
        self.name = "gpt2lab" + (", plain model" if plain else "") + (", compiled" if compile else "")
        self.precision = precision
        model, params = (_plain if plain else _ours)(work, device)
        chosen = {} if work.choice is None or in_model(work.choice) else {work.choice.slot: work.choice}
        settings = {"lr": LR, "warmup_steps": 0, "grad_clip": CLIP, "schedule": "constant", **chosen}
        optim = OptimConfig.model_validate(settings)
        training = TrainingConfig(steps=NEVER_ENDING, batch_tokens=work.tokens, precision=precision, log_every_steps=1)
        if compile:
            compiled(model, data_home() / "compiled")
        state = TrainState(model, build_optimizers(optim, params), scaler=loss_scaler(precision, device))
        self._steps: Iterator[StepRecord] = steps(state, work.batches(), optim, training, seed=0)

    def step(self) -> float:
        return next(self._steps).metrics["train/loss"]


def _ours(work: Work, device: torch.device) -> tuple[nn.Module, list[Param]]:
    model = build_model(work.model(), seed=0, device=device)
    return model, model.params()


def _plain(work: Work, device: torch.device) -> tuple[nn.Module, list[Param]]:
    model = plain_model(work).to(device)
    roles = {True: Role("hidden"), False: Role("vector")}
    return model, [Param(name, p, roles[p.ndim >= 2]) for name, p in model.named_parameters()]


def plain_model(work: Work) -> PlainGPT:
    """The plain model, with the weights that all sides start from."""
    model = PlainGPT(work.n_layer, work.n_head, work.n_embd, work.block_size, work.vocab_size, work.bias)
    model.load_state_dict(initial_weights(work))
    return model


def _module(path: Path) -> Any:
    """A Python file as a module. Raises ConfigError unless it has what nanoGPT's model has."""
    hint = "--vs nanogpt=FOLDER, where FOLDER is a checkout of nanoGPT"
    if not path.is_file():
        raise ConfigError("there is no such file", where=str(path), hint=hint)
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"cannot be imported: {type(error).__name__}: {error}", where=str(path), hint=hint) from error
    if not (hasattr(module, "GPT") and hasattr(module, "GPTConfig")):
        raise ConfigError("has no GPT and GPTConfig", where=str(path), hint=hint)
    return module


def nanogpt_gpt(work: Work, folder: str) -> Any:
    """The model of a checkout of nanoGPT that lies on this machine, with the weights that all sides start from."""
    module = _module(Path(folder) / "model.py")
    config = module.GPTConfig(
        block_size=work.block_size, vocab_size=work.vocab_size, n_layer=work.n_layer, n_head=work.n_head,
        n_embd=work.n_embd, dropout=0.0, bias=work.bias,
    )  # fmt: skip
    model = module.GPT(config)
    ours = {f"transformer.{name}": tensor for name, tensor in initial_weights(work).items()}
    missing = model.load_state_dict(ours, strict=False)
    if missing.unexpected_keys:
        raise ConfigError(f"does not know {', '.join(missing.unexpected_keys)}", where=folder)
    return model


def transformers_gpt2(work: Work) -> Any:
    """Hugging Face's GPT-2, which always has biases, with the weights that all sides start from."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError as error:
        raise EnvironmentFault(
            "the package transformers is not installed", where="--vs transformers", hint="pip install transformers"
        ) from error
    config = GPT2Config(
        n_layer=work.n_layer, n_head=work.n_head, n_embd=work.n_embd, n_positions=work.block_size,
        vocab_size=work.vocab_size, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model: Any = GPT2LMHeadModel(config)
    weights = initial_weights(work)
    weights |= {
        name: torch.zeros_like(tensor) for name, tensor in from_hf(model.state_dict()).items() if name not in weights
    }
    model.load_state_dict(to_hf(weights), strict=False)
    return model


Loss = Callable[[Any, Tensor, Tensor], Tensor]
"""Of a model, on tokens and targets: (B, T), (B, T) -> ()"""


class Other:
    """A step as it is commonly written: batch, loss, backward, clip, AdamW, and the loss read."""

    def __init__(
        self, name: str, model: nn.Module, loss: Loss, optimizer: torch.optim.Optimizer, work: Work,
        precision: Precision,
    ) -> None:  # fmt: skip
        self.name, self.model, self.loss, self.optimizer = name, model.train(), loss, optimizer
        self.batches: Batches = work.batches()
        self.precision, self.device = precision, next(model.parameters()).device
        self.taken = 0

    def step(self) -> float:
        tokens, targets = (torch.from_numpy(x).to(self.device) for x in self.batches.at(self.taken))
        self.taken += 1
        with autocast(self.precision, self.device):
            loss = self.loss(self.model, tokens, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.item())


@dataclass(frozen=True)
class Spec:
    """Which side, as plain data that another process can be given. name: gpt2lab, or what `--vs` names."""

    name: str
    precision: Precision = "fp32"
    plain_model: bool = False
    compile: bool = False

    def make(self, work: Work, device: torch.device) -> Side:
        """The side, ready to train. Raises ConfigError, or EnvironmentFault where a package is missing."""
        if self.name == "gpt2lab":
            return Engine(work, self.precision, device, plain=self.plain_model, compile=self.compile)
        kind, path = other_side(self.name)
        if kind == "engine":
            return Engine(work, self.precision, device, plain=True)
        if kind == "nanogpt":  # with its own choice of optimizer
            model = nanogpt_gpt(work, path).to(device)
            optimizer = model.configure_optimizers(WEIGHT_DECAY, LR, (0.9, 0.95), device.type)
            return Other("nanoGPT", model, lambda gpt, x, y: gpt(x, y)[1], optimizer, work, self.precision)
        loss: Loss = lambda gpt, x, y: gpt.objective(x, y)[0]  # noqa: E731
        if kind == "transformers":
            loss = lambda gpt, x, y: gpt(input_ids=x, labels=y, shift_labels=y).loss  # noqa: E731
        model = (plain_model if kind == "plain" else transformers_gpt2)(work).to(device)
        return Other(kind, model, loss, adamw(model, LR, WEIGHT_DECAY), work, self.precision)


class ProductSide:
    """One product of two square matrices at each step."""

    name = "matrix product"

    def __init__(self, size: int, precision: Precision, device: torch.device) -> None:
        self.precision = precision
        generator = torch.Generator(device).manual_seed(0)
        # random values: GPUs multiply regular patterns with less power, hence faster
        values = torch.randn(size, size, device=device, generator=generator)
        self.matrix = values.to(AUTOCAST.get(precision, torch.float32))

    def step(self) -> float:
        return float((self.matrix @ self.matrix)[0, 0].item())


@dataclass(frozen=True)
class Product:
    """The recipe of such a side. size: rows and columns."""

    size: int
    precision: Precision = "fp32"

    @property
    def flops(self) -> float:
        """Of one product."""
        return 2.0 * self.size**3

    def make(self, work: Any, device: torch.device) -> Side:
        """The side, ready to multiply, whatever work the others have."""
        return ProductSide(self.size, self.precision, device)
