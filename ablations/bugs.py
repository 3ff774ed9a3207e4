"""A museum of famous GPT-2 bugs. Each is one small plug-in in the slot where the mistake lives, tagged `bug`.

    gpt2lab run ablations/bugs.yaml --plugin ablations/bugs.py --scale nano
    gpt2lab test-plugin ablations/bugs.py

Four of them live in the training loop of real code. Here the loop is sound and stays so, and the plug-in makes it
compute what the mistaken loop would. What each did at `nano`, and what finds it: docs/journal.md.

Shapes: B batch, H heads, T queries, S keys, D channels per head, C channels, V vocabulary, n = B T rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor, nn
from torch.optim import AdamW, Optimizer

from gpt2lab.components.attend import Mask, allowed_bias, position_bias, score_map
from gpt2lab.components.attention import attention
from gpt2lab.components.base import Builder, Param
from gpt2lab.components.context import ForwardContext
from gpt2lab.components.init import Draw, Std, gpt2, init, normal
from gpt2lab.components.mask import mask
from gpt2lab.components.objective import objective
from gpt2lab.components.scores import Scores, scores
from gpt2lab.optim import decay_groups, optimizer, schedule
from gpt2lab.optim.schedules import Fraction, cosine

Count = Annotated[int, Field(ge=1)]


# In the model.


class Peeking(Mask):
    """The causal mask with one diagonal too many."""

    def allowed(self, ctx: ForwardContext) -> Tensor:
        """-> (T, S) bool, or (B, 1, T, S) when documents are told apart"""
        return super().allowed(ctx) | (ctx.k_positions[None] == ctx.q_positions[:, None] + 1)


@mask.register(
    "leaky",
    source="transformers issue 48745: four decoders saw later tokens, and their loss fell to nothing",
    tags=["bug"],
)
def leaky(builder: Builder) -> Mask:
    """BUG: every token also sees the next one, which is the one that it has to predict.

    In real code: `torch.tril(ones, diagonal=1)`, or a mask that is dropped on the way to the kernel. The training loss
    and the validation loss both become wonderful, because both cheat; only what the model writes is nonsense.
    First seen in: a loss below what any language model reaches. Caught by: check_no_look_ahead, and doctor's causality.
    """
    # a window, however long, makes attention ask this mask rather than let the kernel draw its own triangle
    return Peeking(window=1 << 40)


@scores.register(
    "unscaled", source="karpathy/ng-video-lecture pull request 6 (scaled by the wrong width)", tags=["bug"]
)
def unscaled(builder: Builder) -> nn.Module:
    """BUG: softmax(q k^T) without 1/sqrt(D).  (B, H, T, S) scores

    In real code: the factor forgotten, or taken from n_embd in the place of the head size. Scores are sqrt(D) times too
    large, so that attention saturates earlier and its gradient vanishes.
    First seen in: diag/attention_logit_max. Caught by: doctor's attention_scale.
    """
    return Scores(builder, qk_norm=False, softcap=None, scale=1.0, gate=False, sink_logits=False)


@attention.register(
    "softmax_over_queries",
    source="labml.ai annotated implementations, issue 146; PyTorch-NLP issue 2",
    can=("bias", "rotate", "value"),
    tags=["bug"],
)
class SoftmaxOverQueries(nn.Module):
    """BUG: the softmax runs along the queries, not along the keys.  (B, T, C) -> (B, T, C)

    In real code: `softmax(dim=1)` or `dim=-2`, or F.softmax without a dim, which picks one. Every key's weights sum to
    one, no query's do; and as a key shares one unit among all later queries, what comes later decides what came before.
    First seen in: nothing, at first: it trains. Caught by: check_no_look_ahead, check_cached_equals_full, doctor's
    softmax_rows and causality.
    """

    def __init__(self, builder: Builder) -> None:
        super().__init__()
        C, self.H = builder.dims.n_embd, builder.dims.n_head
        self.c_attn = builder.linear(C, 3 * C, rows={"query": C, "key": C, "value": C})
        self.c_proj = builder.linear(C, C, "residual_out")
        self.mask, self.scores = builder.build("mask"), builder.build("scores")

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        assert ctx.position is not None
        B, T, C = x.shape
        q, k, v = (part.view(B, T, self.H, C // self.H).transpose(1, 2) for part in self.c_attn(x).chunk(3, -1))
        q, k = self.scores.prepare(q, k, ctx)
        q, k = ctx.position.rotate(q, ctx, "q"), ctx.position.rotate(k, ctx, "k")
        k, v = ctx.cached("k", k), ctx.cached("v", ctx.mix_values(v))  # (B, H, S, D)
        bias = allowed_bias(ctx, self.mask, position_bias(ctx, self.H), torch.float32)
        logits = score_map(q, k, bias, self.scores, (C // self.H) ** -0.5)  # (B, H, T, S)
        y = logits.softmax(-2).to(v.dtype) @ v  # the mistake: -1 is right
        out: Tensor = self.c_proj(self.scores.finish(y.transpose(1, 2).reshape(B, T, C), x, v))
        return out


@objective.register(
    "unshifted", source="transformers pull request 404: GPT and GPT-2 losses were not shifted", tags=["bug"]
)
class Unshifted(nn.Module):
    """BUG: the target of a token is that token itself, not the next one.  -> (n,)

    In real code: `y = x` in the place of `y = x shifted by one`, or labels handed to a model that does not shift them.
    The loss that is trained falls to zero within some hundred steps; real next tokens become ever less likely.
    First seen in: train/objective far below val/loss. Caught by: doctor's targets.
    """

    def __init__(self, builder: Builder) -> None:
        super().__init__()
        self.T = builder.dims.block_size

    def rows(self, logits: Tensor, targets: Tensor, nll: Tensor) -> Tensor:
        """logits (n, V) float32, targets (n,) -> (n,)"""
        own = targets.roll(1)  # a row's own token is what the row before it should have predicted
        own[:: self.T] = -100  # which the first row of a sequence does not have
        return F.cross_entropy(logits, own, reduction="none")


@init.register("unscaled_residual", source="transformers pull request 13573 (added the scaling in 2021)", tags=["bug"])
def unscaled_residual(builder: Builder, *, std: Std = 0.02) -> Draw:
    """BUG: matrices that write into the stream start as large as all others, without 1/sqrt(2 L).

    In real code: the line of the paper overlooked, or a rule on names (`c_proj`) that no longer matches. The stream's
    variance grows with every block; the deeper the model, the more it matters.
    First seen in: diag/activation_rms at step 0. Caught by: doctor's residual_scaling.

    std: standard deviation of every matrix.
    """

    def draw(param: Param, generator: Generator) -> None:
        normal(param, std, 1.0, generator)

    return draw


def head_of_its_own(model: Any, options: dict[str, Any]) -> list[str]:
    """A tie can only be broken where there are two matrices."""
    return (
        [] if getattr(model.head, "name", "") == "untied" else ["needs model.head: untied, the matrix it leaves over"]
    )


@init.register(
    "tie_broken", source="accelerate pull request 1204: loading made new tensors", check=head_of_its_own, tags=["bug"]
)
def tie_broken(builder: Builder, *, std: Std = 0.02) -> Draw:
    """BUG: head and embedding start equal and are two tensors, as after loading a checkpoint that broke their tie.

    In real code: `load_state_dict(..., assign=True)`, a model built on the meta device, or `nn.Parameter(weight)` for
    the loaded matrix. All is right at first and drifts apart with training; saving one of the two then loses the other.
    It goes with `model.head: untied`.
    First seen in: the number of parameters. Caught by: doctor's tie.

    std: of the matrices, as in GPT-2's init.
    """
    ordinary, table = gpt2(builder, std=std), {}

    def draw(param: Param, generator: Generator) -> None:
        ordinary(param, generator)
        if param.role.kind == "embedding":
            table["rows"] = param.tensor.detach().clone()
        elif param.role.kind == "head":
            if param.tensor.shape == table["rows"].shape:  # not where the table is factorized
                param.tensor.data.copy_(table["rows"])

    return draw


# In the training loop.


class KeepsGradients(AdamW):
    """AdamW after which gradients are not forgotten: the next backward adds to them."""

    def __init__(self, groups: Any, **options: Any) -> None:
        super().__init__(groups, **options)
        for group in self.param_groups:
            for tensor in group["params"]:
                tensor.register_post_accumulate_grad_hook(self.add_kept)

    def step(self, closure: Any = None) -> Any:
        """Update; the gradients become part of the state, so that a resumed training has them too."""
        loss = super().step(closure)
        for group in self.param_groups:
            for tensor in group["params"]:
                if tensor.grad is not None:
                    self.state[tensor]["kept"] = tensor.grad.clone()
        return loss

    def add_kept(self, tensor: Tensor) -> None:
        """After the first backward since the last step."""
        kept = self.state[tensor].pop("kept", None)
        if kept is not None:
            assert tensor.grad is not None
            tensor.grad.add_(kept)


@optimizer.register("adamw_not_zeroed", source="pytorch issue 47175; karpathy/llm.c pull request 548", tags=["bug"])
def adamw_not_zeroed(params: Sequence[Param], lr: float) -> list[Optimizer]:
    """BUG: gradients are never zeroed, so that every step follows the sum of all that came before.

    In real code: `optimizer.zero_grad()` forgotten. The loop here drops gradients; this optimizer brings them back
    after the next backward, before they are clipped, as the mistaken loop would have it.
    First seen in: train/grad_norm, which does not fall with the loss. Caught by: check_gradients_untouched, and
    doctor's gradient.
    """
    return [KeepsGradients(decay_groups(params, 0.1), lr=lr, betas=(0.9, 0.95))]


@objective.register(
    "undivided", source="karpathy/nanoGPT issues 168 and 206; huggingface/blog pull request 2414", tags=["bug"]
)
class Undivided(nn.Module):
    """BUG: the loss of each micro-batch counts in full, not divided by their number.  -> (n,)

    In real code: `loss.backward()` without `loss / accumulation_steps`. The gradient is that many times too long. The
    loop here divides; this objective takes the division back. Adam hardly minds the length, clipping does.
    First seen in: train/grad_norm, larger by that factor from the first step. Caught by: doctor's accumulation.

    micro_batches: in a step.
    """

    def __init__(self, builder: Builder, *, micro_batches: Count = 4) -> None:
        super().__init__()
        self.micro_batches = micro_batches

    def rows(self, logits: Tensor, targets: Tensor, nll: Tensor) -> Tensor:
        """nll (n,) -> (n,)"""
        return self.micro_batches * nll


@optimizer.register(
    "adamw_decays_all", source="karpathy/minGPT pull requests 16 and 18; lit-llama issue 254", tags=["bug"]
)
def adamw_decays_all(params: Sequence[Param], lr: float) -> list[Optimizer]:
    """BUG: weight decay on gains and biases as well, which pulls every norm towards zero.

    In real code: `AdamW(model.parameters(), weight_decay=0.1)`, or a list of exceptions such as "LayerNorm.weight" that
    does not match GPT-2's names (ln_1).
    First seen in: the norms' gains, when somebody looks. Caught by: doctor's decay.
    """
    return [AdamW([param.tensor for param in params], lr=lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)]


@schedule.register("cosine_per_micro_batch", source="pytorch-lightning issue 1476; accelerate issue 963", tags=["bug"])
def cosine_per_micro_batch(
    steps: int, warmup_steps: int, *, micro_batches: Count = 4, final_fraction: Fraction = 0.1
) -> Callable[[int], float]:
    """BUG: the schedule is stepped once per micro-batch, so that it runs through before training does.

    In real code: `scheduler.step()` inside the loop over micro-batches. Warm-up is too short, and most of the training
    happens at the final rate.
    First seen in: train/lr. Caught by: check_schedule, and doctor's learning_rate.

    micro_batches:  in a step.
    final_fraction: what is left of the peak at the end.
    """
    right = cosine(steps, warmup_steps, final_fraction=final_fraction)
    return lambda step: right(micro_batches * step)
