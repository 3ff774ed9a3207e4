"""The training section of a config."""

from __future__ import annotations

from pydantic import Field

from gpt2lab.errors import Problem
from gpt2lab.schema import Settings
from gpt2lab.training.compiling import Compile
from gpt2lab.training.guard import NonFinite
from gpt2lab.training.precision import DeviceName, Precision


class TrainingConfig(Settings):
    """How long and how to train; the defaults are one pass over 10B tokens, as for GPT-2 124M."""

    steps: int = Field(19_073, ge=1)
    """Optimizer steps."""
    batch_tokens: int = Field(524_288, ge=1)
    """Tokens in each step, over all ranks."""
    micro_batch_sequences: int | None = Field(None, ge=1)
    """Sequences in one forward pass of one rank: fewer need less memory for the same step. Null: all of them."""
    precision: Precision = "fp32"
    """Precision of matrix products; weights and optimizer state are always fp32."""
    compile: Compile = "auto"
    """Whether to use torch.compile; auto decides by device and length of the training."""
    nonfinite: NonFinite = "stop"
    """What to do if a loss or gradient is not finite: stop the training, or skip the step and continue."""
    max_skipped_steps: int = Field(20, ge=1)
    """Steps skipped in a row at which a training counts as diverged."""
    device: DeviceName = "auto"
    """Device; auto is cuda, else mps, else cpu."""
    deterministic: bool = False
    """Use only kernels with reproducible bits, which costs some speed; on CPU they always are."""
    threads: int | None = Field(None, ge=1)
    """CPU threads; null keeps torch's choice."""
    checkpoint_every_steps: int = Field(1_000, ge=1)
    """Steps between checkpoints."""
    keep_checkpoints: int = Field(2, ge=1)
    """Number of newest checkpoints kept during training; at the end only the last one is kept."""
    keep_best: bool = False
    """Whether to keep the checkpoint with the lowest validation loss as well."""
    milestone_every_steps: int | None = Field(None, ge=1)
    """Steps between checkpoints that are never deleted, to branch from; null keeps none."""
    rank_timeout_seconds: float = Field(120.0, gt=0)
    """Time without a sign of life from a rank after which the training ends with its name."""
    log_every_steps: int = Field(1, ge=1)
    """Steps between rows of training metrics in the journal."""

    def problems(self, block_size: int, world_size: int = 1) -> list[Problem]:
        """Problems with sequences of `block_size` tokens on `world_size` ranks."""
        unit = block_size * world_size
        if self.batch_tokens % unit == 0:
            return []
        per = f"block_size {block_size}" + (f" x {world_size} ranks" if world_size > 1 else "")
        nearest = max(1, round(self.batch_tokens / unit)) * unit
        return [
            Problem("training.batch_tokens", f"{self.batch_tokens} is no multiple of {per}; the nearest is {nearest}")
        ]
