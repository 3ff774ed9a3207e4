"""GPT: assembles the chosen components. With all defaults it is canonical GPT-2, down to the parameter names.

Shapes: B batch, T tokens, C channels, V vocabulary, n = B T rows.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from gpt2lab import components  # noqa: F401  (fills the slots)
from gpt2lab.components.base import Builder, Dims, Param, own_method, params
from gpt2lab.components.chunked import loss_sums
from gpt2lab.components.context import Cache, ForwardContext
from gpt2lab.components.parametrization import Scaling
from gpt2lab.components.position import Position
from gpt2lab.errors import ConfigError
from gpt2lab.registry import SLOTS, Choice, read_field

MODEL_SLOTS = (
    "position", "norm", "residual", "attention", "mask", "scores", "mlp", "linear", "embedding", "stack", "head",
    "objective", "init", "parametrization",
)  # fmt: skip


def default(slot: str) -> Any:
    """The default choice of a slot, as a config field."""
    return Field(default_factory=lambda: read_field(slot, SLOTS[slot].default))


class ModelConfig(Dims):
    """Sizes and components of one model; the defaults are GPT-2 124M. In a per-layer slot, a list is a pattern
    that repeats over the layers; in `embedding`, `stack` and `objective` it is an ordered list of parts."""

    position: tuple[Choice, ...] = default("position")
    norm: tuple[Choice, ...] = default("norm")
    residual: tuple[Choice, ...] = default("residual")
    attention: tuple[Choice, ...] = default("attention")
    mask: tuple[Choice, ...] = default("mask")
    scores: tuple[Choice, ...] = default("scores")
    mlp: tuple[Choice, ...] = default("mlp")
    linear: tuple[Choice, ...] = default("linear")
    embedding: tuple[Choice, ...] = default("embedding")
    stack: tuple[Choice, ...] = default("stack")
    head: Choice = default("head")
    objective: tuple[Choice, ...] = default("objective")
    init: Choice = default("init")
    parametrization: Choice = default("parametrization")

    @field_validator(*MODEL_SLOTS, mode="before")
    @classmethod
    def _components(cls, raw: object, info: Any) -> Choice | tuple[Choice, ...]:
        return read_field(info.field_name, raw)

    def choices(self) -> dict[str, tuple[Choice, ...]]:
        """Slot -> choices; a single choice is a pattern of length 1."""
        fields = {slot: getattr(self, slot) for slot in MODEL_SLOTS}
        return {slot: c if isinstance(c, tuple) else (c,) for slot, c in fields.items()}


class GPT(nn.Module):
    """A decoder-only transformer made of the chosen components.

    >>> model = build_model(ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=100))
    >>> model(torch.zeros(1, 16, dtype=torch.long)).shape
    torch.Size([1, 16, 100])
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        builder = Builder(config, config.choices())
        self.progress = builder.progress
        self.scaling: Scaling = builder.build("parametrization")
        self.wte, *others = builder.build_all("embedding")
        self.embedding = nn.ModuleList(others)
        self.positions, self.wpe = build_positions(builder)
        self.drop = nn.Dropout(config.dropout)
        self.stack = nn.ModuleList(builder.build_all("stack"))
        sources = [self._source(layer) for layer in range(config.n_layer)]
        built = sorted(set(sources))
        self.block_of = [built.index(source) for source in sources]
        self.h = nn.ModuleList(builder.at(layer=layer).build("residual") for layer in built)
        self._share_branches()
        self.ln_f = builder.build("norm") if self.h[-1].final_norm else nn.Identity()
        self.lm_head = builder.build("head")
        self.terms = nn.ModuleList(builder.build_all("objective"))
        self.roles = {param.name: param.role for param in params(self)}
        self.compiled_loss = False

    def _source(self, layer: int) -> int:
        """The layer whose weights `layer` uses, according to the parts of the stack."""
        for part in self.stack:
            if part.shares == "block":
                layer = part.weights_from(layer)  # type: ignore[operator]
        return layer

    def _share_branches(self) -> None:
        """Give blocks the attention or MLP of another layer, according to the parts of the stack."""
        for part in self.stack:
            for layer, block in enumerate(self.block_of):
                name: Any = part.shares
                if name != "block" and getattr(self.h[block], name) is not None:
                    source = self.h[self.block_of[part.weights_from(layer)]]  # type: ignore[operator]
                    setattr(self.h[block], name, getattr(source, name))

    @property
    def max_context(self) -> int | None:
        """The longest context in tokens that the positions support; None without limit."""
        limits = [p.max_context for p in self.positions if p.max_context is not None]
        return min(limits) if limits else None

    def params(self) -> list[Param]:
        """Every parameter once, with its role and rate, for optimizers and inits."""
        named, rates = self.named_parameters(), self.scaling.rate
        return [Param(name, x, self.roles[name], rates.get(self.roles[name].kind, 1.0)) for name, x in named]

    def initialise(self, seed: int) -> None:
        """Draw every matrix by the init slot, each from its own generator (seed, name); the same on every device."""
        draw = SLOTS["init"].build(self.config.init, Builder(self.config, self.config.choices()))
        for param in self.params():
            if param.role.kind == "vector":
                continue
            generator = torch.Generator().manual_seed(name_seed(seed, param.name))
            drawn = Param(param.name, nn.Parameter(torch.empty(param.tensor.shape)), param.role)
            draw(drawn, generator)
            factor = self.scaling.std.get(param.role.kind, 1.0)
            with torch.no_grad():
                param.tensor.copy_(drawn.tensor if factor == 1.0 else drawn.tensor * factor)

    def hidden(self, ctx: ForwardContext) -> Tensor:
        """The normalised stream after the last block, the input of the head.  -> (B, T, C)

        For GPT-2: wte[tokens] + wpe, every block, ln_f. Its `embedding` and `stack` are empty, its blocks open and
        close the stream unchanged, and its output is not scaled; such lines serve other components.
        """
        x = self.wte(ctx.tokens, ctx)
        for part in self.embedding:
            x = part(x, ctx)
        for position in unique(self.positions):
            x = position.add(x, ctx)
        x = self.drop(x)
        x = self.h[0].open(x)  # type: ignore[operator]
        for depth, block in enumerate(self.block_of):
            ctx.enter(depth, self.positions[depth])
            for part in self.stack:
                x = part.before(depth, x, ctx)  # type: ignore[operator]
            x = self.h[block](x, ctx)
            for part in self.stack:
                x = part.after(depth, x, ctx)  # type: ignore[operator]
            if ctx.observer is not None:
                ctx.observer.stream(depth, x)
        x = self.h[-1].close(x)  # type: ignore[operator]
        if ctx.cache is not None:
            ctx.cache.length += ctx.tokens.shape[1]
        out: Tensor = self.ln_f(x)
        return out if self.scaling.output == 1.0 else out * self.scaling.output

    def context(self, tokens: Tensor, cache: Cache | None = None, documents: Tensor | None = None) -> ForwardContext:
        """The context of a forward pass over `tokens` (B, T). Raises ConfigError beyond `max_context`."""
        end = tokens.shape[1] + (cache.length if cache is not None else 0)
        if self.max_context is not None and end > self.max_context:
            raise ConfigError(
                f"{end} tokens of context, but the positions are limited to {self.max_context}",
                where="model.position",
                hint="a scheme without a limit, such as rotary, or a larger model.block_size",
            )
        parts: Any = self.stack
        return ForwardContext(
            tokens, cache=cache, documents=documents, stack=parts, score_factor=self.scaling.scores,
            progress=self.progress.value,
        )  # fmt: skip

    def trunk(self, tokens: Tensor, documents: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The model without its head, and auxiliary losses by name: the part of a forward pass that is compiled.
        (B, T) -> (B, T, C), {name: ()}"""
        ctx = self.context(tokens, documents=documents)
        return self.hidden(ctx), ctx.losses

    def forward(self, tokens: Tensor, *, cache: Cache | None = None, documents: Tensor | None = None) -> Tensor:
        """Logits of the next token at every position.  tokens (B, T) int64 -> (B, T, V).

        With a cache, `tokens` continue the cached sequence. With `documents` (B, T), attention stays within a document.
        Raises ConfigError beyond `max_context`.
        """
        x = self.hidden(self.context(tokens, cache, documents))
        logits: Tensor = self.lm_head(x.flatten(0, 1), self.wte)
        return logits.view(*tokens.shape, -1)

    def loss(self, tokens: Tensor, targets: Tensor, *, documents: Tensor | None = None) -> Tensor:
        """Mean cross entropy of the next token in nats, whatever the objective.  (B, T), (B, T) -> ()

        Targets of -100 are ignored.
        """
        return self._terms(tokens, targets, documents, with_objective=False)[1]["loss"]

    def objective(
        self, tokens: Tensor, targets: Tensor, *, documents: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The training objective, and its parts: `loss` (plain cross entropy) and every auxiliary loss.

        (B, T), (B, T) -> (), {name: ()}
        """
        return self._terms(tokens, targets, documents, with_objective=True)

    def _terms(
        self, tokens: Tensor, targets: Tensor, documents: Tensor | None, with_objective: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        x, auxiliary = self.trunk(tokens, documents)
        count = (targets != -100).sum()
        if not with_objective:
            loss = self._loss_sums(x, targets, [])[0] / count
            return loss, {"loss": loss}
        deep = [term for term in self.terms if own_method(term, "from_hidden")]
        by_rows = [term for term in self.terms if term not in deep]
        with torch.set_grad_enabled(bool(by_rows) and torch.is_grad_enabled()):
            objective, nll = self._loss_sums(x, targets, by_rows)
        total = objective / count if by_rows else torch.zeros_like(nll)
        if deep:
            ctx = ForwardContext(
                tokens, documents=documents, score_factor=self.scaling.scores, progress=self.progress.value
            )
            ctx.enter(len(self.block_of), self.positions[-1])
            factor = self.scaling.output
            for term in deep:
                summed = term.from_hidden(x / factor, targets, ctx, self._cross_entropy)  # type: ignore[operator]
                total = total + summed / count
            auxiliary = {**auxiliary, **ctx.losses}
        parts = {"loss": nll / count}
        for name, loss in auxiliary.items():
            total = total + loss
            kind = name.partition(".")[0]
            parts[kind] = parts.get(kind, torch.zeros_like(loss.detach())) + loss.detach()
        return total, parts

    def _loss_sums(self, x: Tensor, targets: Tensor, terms: list[nn.Module]) -> tuple[Tensor, Tensor]:
        """See `loss_sums`.  (..., C), (...) -> (), ()"""
        return loss_sums(
            x.flatten(0, -2), targets.flatten(), self.lm_head, self.wte, terms, self.config.vocab_size,
            fused=self.compiled_loss,
        )  # fmt: skip

    def _cross_entropy(self, x: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy for terms of the objective, summed.  (..., C), (...) -> ()"""
        return self._loss_sums(x * self.scaling.output, targets, [])[0]


def build_positions(builder: Builder) -> tuple[list[Position], nn.Module]:
    """The scheme of every layer, equal choices sharing one instance, and the module that holds their parameters.

    A single scheme is itself the model's `wpe`, so learned positions are called wpe.weight as in GPT-2.
    """
    schemes: dict[str, Position] = {}
    layers: list[Position] = []
    for layer in range(builder.dims.n_layer):
        choice = builder.at(layer=layer).choice("position")
        name = repr(choice.full())
        if name not in schemes:
            schemes[name] = builder.at(choices={**builder.choices, "position": (choice,)}).build("position")
            schemes[name].key = str(len(schemes) - 1)
        layers.append(schemes[name])
    distinct = list(schemes.values())
    return layers, distinct[0] if len(distinct) == 1 else nn.ModuleList(distinct)


def unique(items: list[Position]) -> list[Position]:
    """Each object once, in order."""
    return list({id(item): item for item in items}.values())


def name_seed(seed: int, name: str) -> int:
    """A 63-bit seed from a run's seed and a parameter's name."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") >> 1


def build_model(config: ModelConfig, *, seed: int = 0, device: str | torch.device = "cpu") -> GPT:
    """The model that `config` describes, with initial weights that depend only on the seed and parameter names."""
    model = GPT(config)
    model.initialise(seed)
    return model.to(device)
