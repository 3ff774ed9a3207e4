"""One pass through a model as a walk through its shapes: what comes about, in which order, and what it costs.

for row in trace(ModelConfig()).rows:
    print(row.name, row.shape, row.parameters, row.forward)
"""

from __future__ import annotations

from dataclasses import dataclass

from gpt2lab.errors import ConfigError
from gpt2lab.model import ModelConfig
from gpt2lab.trace.passes import build, run
from gpt2lab.trace.rows import Row, Rows, letters
from gpt2lab.trace.words import Words

MOST = 1 << 56  # numbers in one tensor, of which torch can still count the bytes


@dataclass(frozen=True)
class Trace:
    """One pass of the training objective. rows: in the order in which tensors come about."""

    config: ModelConfig
    batch: int
    tokens: int
    rows: tuple[Row, ...]

    @property
    def parameters(self) -> int:
        """Of the model, each once."""
        return sum(row.parameters for row in self.rows)

    @property
    def forward(self) -> int:
        """FLOP of the forward pass."""
        return sum(row.forward for row in self.rows)

    @property
    def backward(self) -> int:
        """FLOP of the way back."""
        return sum(row.backward for row in self.rows)

    def per_token(self, flops: int) -> float:
        """FLOP of the pass as FLOP per token."""
        return flops / (self.batch * self.tokens)

    @property
    def letters(self) -> dict[str, int]:
        """What the letters of shapes stand for."""
        return {"B": self.batch, "T": self.tokens, "n": self.batch * self.tokens, **letters(self.config)}


def trace(config: ModelConfig, *, batch: int = 1, tokens: int | None = None) -> Trace:
    """Run the objective of this model once, forward and back, without data, and tell what was seen.

    tokens: in each sequence; None is block_size.  Raises ConfigError beyond what the positions can express.
    """
    tokens = config.block_size if tokens is None else tokens
    largest = batch * tokens * max(config.n_head * tokens, config.vocab_size, 4 * config.n_embd)
    if largest > MOST:
        raise ConfigError(
            f"{batch} x {tokens} tokens make tensors too large to count", hint="smaller --batch, --tokens"
        )
    built = build(config)
    seen = run(built, batch, tokens, back=True)
    # a second pass of another size tells which dimensions are B and T
    limit = built.model.max_context
    other = tokens - 1 or (2 if limit is None or limit > 1 else None)
    twin = run(built, batch + 1, other, back=False).root if other else None
    rows = Rows(Words(built), seen.root, twin, config).all()
    unused = {name: left for name, left in seen.left.items() if left}
    if unused:
        names = ", ".join(unused)
        rows.append(
            Row("not used", f"parameters without a part in this pass: {names}", None, parameters=sum(unused.values()))
        )
    return Trace(config, batch, tokens, tuple(rows))


__all__ = ["Row", "Trace", "trace"]
