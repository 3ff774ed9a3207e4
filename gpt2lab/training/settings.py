"""The training section of a config."""

from __future__ import annotations

from pydantic import Field

from gpt2lab.errors import Problem
from gpt2lab.schema import Settings
from gpt2lab.training.compiling import Compile
from gpt2lab.training.guard import NonFinite
from gpt2lab.training.precision import DeviceName, Precision


class TrainingConfig(Settings):
    """How long and how to train; the defaults are one pass over 10B tokens, the GPT-2 124M recipe."""

    steps: int = Field(19_073, ge=1)
    """Optimizer steps."""
    batch_tokens: int = Field(524_288, ge=1)
    """Tokens in each step, over all ranks."""
    micro_batch_sequences: int | None = Field(None, ge=1)
    """Sequences in one forward pass of one rank: fewer need less memory for the same step. Null: all of them."""
    precision: Precision = "fp32"
    """Arithmetic of matrix products; weights and optimizer state are fp32 always."""
    compile: Compile = "auto"
    """Whether torch.compile translates the blocks; auto decides by device and length of the training."""
    nonfinite: NonFinite = "stop"
    """What a loss or gradient that is not finite does: stop the training, or skip its step and go on."""
    max_skipped_steps: int = Field(20, ge=1)
    """Steps skipped in a row at which a training counts as diverged."""
    device: DeviceName = "auto"
    """Where to compute; auto is cuda, else mps, else cpu."""
    deterministic: bool = False
    """Choose kernels that give the same bits each time, at some cost in speed; on CPU they always do."""
    threads: int | None = Field(None, ge=1)
    """CPU threads; null leaves torch's choice."""
    checkpoint_every_steps: int = Field(1_000, ge=1)
    """Steps between checkpoints."""
    keep_checkpoints: int = Field(2, ge=1)
    """How many of the newest checkpoints stay while training; in the end the last one."""
    keep_best: bool = False
    """Whether the checkpoint of the lowest validation loss stays, too."""
    milestone_every_steps: int | None = Field(None, ge=1)
    """Steps between checkpoints that stay for good, to branch from; null keeps none."""
    rank_timeout_seconds: float = Field(120.0, gt=0)
    """How long a rank may be silent before it is named and the training ends."""
    log_every_steps: int = Field(1, ge=1)
    """Steps between records that carry metrics."""

    def problems(self, block_size: int, world_size: int = 1) -> list[Problem]:
        """What cannot mean anything with sequences of `block_size` tokens on `world_size` ranks."""
        unit = block_size * world_size
        if self.batch_tokens % unit == 0:
            return []
        per = f"block_size {block_size}" + (f" x {world_size} ranks" if world_size > 1 else "")
        nearest = max(1, round(self.batch_tokens / unit)) * unit
        return [
            Problem("training.batch_tokens", f"{self.batch_tokens} is no multiple of {per}; the nearest is {nearest}")
        ]
