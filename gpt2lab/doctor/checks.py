"""Checks of a run: of its journal, of its first steps, which are trained again, and of its model under probes.

No check depends on the name of a component.

Shapes: n sequences of a batch, B batch, H heads, T tokens, S keys, D channels per head, C channels, V vocabulary.
"""

from __future__ import annotations

import copy
import itertools
import lzma
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2lab.analysis.compare import failure_ceiling_of
from gpt2lab.components.attend import score_map
from gpt2lab.components.base import Param
from gpt2lab.components.scores import Scores
from gpt2lab.components.stack import CrossLayer
from gpt2lab.config import Config
from gpt2lab.data.curricula import batches_of, optim_of
from gpt2lab.data.prepared import Prepared
from gpt2lab.errors import ConfigError, DataFault, Gpt2labError
from gpt2lab.evaluation.validation import plain_windows
from gpt2lab.model import GPT, build_model
from gpt2lab.optim.groups import build_optimizers
from gpt2lab.registry import SLOTS
from gpt2lab.reuse.measure import config_of, data_of, load_weights
from gpt2lab.store import Row, RunFolder
from gpt2lab.training.checkpoints import FILES, checkpoints, damage
from gpt2lab.training.loop import reseed, steps
from gpt2lab.training.precision import autocast, choose_device, set_arithmetic
from gpt2lab.training.state import TrainState, step_of

# the run under examination --------------------------------------------------------------------------------------------

SEQUENCES, LONGEST = 4, 512
"""Number and length of the validation windows for probes."""


@dataclass(frozen=True)
class Finding:
    """A symptom of a bug in training.

    severity: `error` if the run's result is invalid, `warning` if it is probably not as intended.
    evidence: a sentence with the numbers.  causes: usual causes, the most common first.
    """

    name: str
    severity: Literal["error", "warning"]
    evidence: str
    causes: Sequence[str]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "causes": list(self.causes)}


def error(name: str, evidence: str, *causes: str) -> Finding:
    """A finding that makes the run's result invalid."""
    return Finding(name, "error", evidence, causes)


def warning(name: str, evidence: str, *causes: str) -> Finding:
    """A finding of something probably unintended."""
    return Finding(name, "warning", evidence, causes)


class NotExamined(Exception):
    """Raised where a check does not apply to a run, with the reason."""


@dataclass(frozen=True)
class ExaminedRun:
    """One run under examination. Attributes that are not available raise NotExamined."""

    folder: RunFolder
    config: Config
    rows: Sequence[Row]

    @classmethod
    def load(cls, folder: RunFolder) -> ExaminedRun:
        """Read the run's files. Raises ConfigError when there is no such run, DataFault when it is damaged."""
        if folder.status() == "absent":
            raise ConfigError("there is no such run", where=str(folder.path), hint="gpt2lab runs")
        return cls(folder, config_of(folder), folder.rows())

    @cached_property
    def result(self) -> dict[str, Any]:
        """result.json; empty until the run has ended."""
        return self.folder.result() or {}

    @cached_property
    def stack(self) -> dict[str, Any]:
        """Software and devices that it ran on; empty if unknown."""
        return self.result.get("stack") or {}

    @cached_property
    def device(self) -> torch.device:
        """The device for the examination."""
        return choose_device(self.config.training.device)

    @cached_property
    def step(self) -> int:
        """Training steps of the newest weights."""
        if self.result.get("status") == "finished":
            return int(self.result["steps"])
        return next((step for step, _ in checkpoints(self.folder.checkpoints)), 0)

    def series(self, metric: str) -> dict[int, float]:
        """A metric of the journal by step, finite values only."""
        values = {row["step"]: row["metrics"].get(metric) for row in self.rows}
        return {step: float(value) for step, value in values.items() if value is not None and math.isfinite(value)}

    def last(self, metric: str) -> tuple[int, float]:
        """Step and value of its last entry."""
        series = self.series(metric)
        if not series:
            raise NotExamined(f"no {metric} in its journal")
        return max(series.items())

    @cached_property
    def data(self) -> Prepared:
        """Its training data."""
        try:
            return data_of(self.folder, self.config)
        except Gpt2labError as reason:
            raise NotExamined(f"its data: {reason}") from reason

    def build(self) -> GPT:
        """Its model with the initial weights, in evaluation mode."""
        model = build_model(self.config.model, seed=self.config.seed, device=self.device).eval()
        model.progress.set(0.0)
        return model

    @cached_property
    def start(self) -> GPT:
        """The model before its first step, in evaluation mode."""
        if self.config.branch:
            raise NotExamined(f"it branches from {self.config.branch}")
        return self.build()

    @cached_property
    def now(self) -> GPT:
        """The model with its newest weights, in evaluation mode."""
        if not self.step:
            raise NotExamined("no checkpoint yet")
        model = self.build()
        try:
            load_weights(model, self.folder, self.step)
        except DataFault as reason:
            raise NotExamined(str(reason)) from reason
        return model

    @property
    def newest(self) -> GPT:
        """The model with its newest weights, or at the start where there are none."""
        return self.now if self.step else self.start

    @cached_property
    def tokens(self) -> Tensor:
        """Some validation windows, each with the token after it.  -> (B, T + 1) int64"""
        block = self.config.model.block_size
        try:
            windows = plain_windows(self.data.validation, block_size=block, total=SEQUENCES * block)
        except ConfigError as reason:
            raise NotExamined(f"its validation text is too short: {reason}") from reason
        starts = [window.start for window in windows if window.length == block]
        rows = np.stack([self.data.validation[start : start + min(block, LONGEST) + 1] for start in starts])
        return torch.as_tensor(rows, device=self.device)


# the journal: losses, rates, sizes of steps ---------------------------------------------------------------------------

LOSS, RATE, LOGITS = "val/loss", "train/lr", "diag/logit_rms"

BELOW_UNIFORM, ABOVE_UNIFORM = 0.1, 1.0
"""Nats around ln V within which the loss of a fresh model lies (the contract test of components says the same)."""
IMPOSSIBLE = 0.2
"""Share of xz's size for the same tokens; the best models reach about a third."""
COMPRESSED_TOKENS = 1 << 20
ENOUGH_STEPS, ENOUGH_SHARE = 300, 0.9
"""Steps after which any model without a bug beats the unigram frequencies; share of training after which it must."""
LEAST_WARMUP, EARLY = 5, 0.9
"""From this many warm-up steps on, the peak must not be reached before this share of them."""
LONG_AT_THE_END = 0.5
"""Longest share of training at the final rate."""


def checkpoint(run: ExaminedRun) -> Finding | None:
    """Every checkpoint is as it was written, and a finished run has that of its last step."""
    saved = list(checkpoints(run.folder.checkpoints))
    reasons = [f"{path.name}: {reason}" for step, path in saved if (reason := damage(path, step, FILES))]
    if not reasons and run.result.get("status") == "finished" and run.step not in dict(saved):
        reasons = [f"none of the last step, {run.step}: the final weights are gone"]
    if not saved and not reasons:
        raise NotExamined("no checkpoint yet")
    causes = ("a disk that fails", "a file that was edited or copied in part", "files that were deleted to make room")
    return error("checkpoint", "; ".join(reasons), *causes) if reasons else None


def loss_at_start(run: ExaminedRun) -> Finding | None:
    """The first loss of an untrained model is near ln V."""
    losses = run.series(LOSS)
    if run.config.branch or 0 not in losses:
        raise NotExamined("no loss before the first step in its journal")
    loss, uniform = losses[0], math.log(run.config.model.vocab_size)
    if uniform - BELOW_UNIFORM <= loss <= uniform + ABOVE_UNIFORM:
        return None
    rms = run.series(LOGITS).get(0)
    predicted = f"; its logits, of rms {rms:.3f}, predict about {uniform + rms**2 / 2:.3f}" if rms is not None else ""
    evidence = f"the loss before the first step is {loss:.3f}, and ln V is {uniform:.3f}{predicted}"
    below = ("the model sees what it predicts", "the validation text is not that of the tokenizer")
    above = ("initial weights that are too large", "a missing last norm", "scores that are scaled twice")
    return error("loss_at_start", evidence, *(below if loss < uniform else above))


def impossible_loss(run: ExaminedRun) -> Finding | None:
    """The loss is not far below the size of the compressed text."""
    step, loss = run.last(LOSS)
    validation = run.data.validation
    ids = np.asarray(validation[: min(len(validation), COMPRESSED_TOKENS)])
    small = ids.astype(np.uint8 if run.data.vocab_size <= 256 else np.uint16 if ids.max() < 1 << 16 else np.uint32)
    packed = 8 * len(lzma.compress(small.tobytes(), preset=6)) / len(ids) * math.log(2)  # nats per token
    if loss >= IMPOSSIBLE * packed:
        return None
    return error(
        "impossible_loss",
        f"the validation loss at step {step} is {loss:.3f} nats per token; xz needs {packed:.3f} for the same "
        f"text, and counting pairs of tokens reaches {run.data.floors['bigram']:.3f}",
        "the model sees what it predicts (see causality)",
        "validation text is part of the training text",
    )


def learned_nothing(run: ExaminedRun) -> Finding | None:
    """The loss at the end of training is below that from which on studies count a run as failed."""
    step, loss = run.last(LOSS)
    ceiling = failure_ceiling_of(run.data.floors)
    if step < ENOUGH_SHARE * run.config.training.steps or loss < ceiling:
        return None
    evidence = (
        f"the validation loss at step {step} is {loss:.3f} nats, not below {ceiling:.3f}, so that it counts as failed; "
        f"token frequencies alone reach {run.data.floors['unigram']:.3f}"
    )
    if step < ENOUGH_STEPS:
        raise NotExamined(f"{evidence}, and {step} steps may be too few for more")
    return error(
        "learned_nothing",
        evidence,
        "targets that are not the next token",
        "gradients that are not those of the batch",
        "a rate far off",
    )


def learning_rate(run: ExaminedRun) -> Finding | None:
    """The logged rate follows its schedule, rises through the whole warm-up, and does not end long before training."""
    optim, training = run.config.optim, run.config.training
    logged = run.series(RATE)
    per_batch = "the schedule is stepped once per micro-batch or per device"
    if not logged:
        raise NotExamined(f"no {RATE} in its journal")
    multiplier = optim.multiplier(training.steps)
    for step, rate in logged.items():
        expected = optim.lr * multiplier(step - 1)
        if not math.isclose(rate, expected, rel_tol=1e-6):
            evidence = f"the rate of step {step} was {rate:.4g}; {optim.schedule} says {expected:.4g}"
            return error("learning_rate", evidence, per_batch, "the schedule was changed or stepped at another place")
    rates = [multiplier(step) for step in range(training.steps)]
    top, bottom = max(rates), min(rates[optim.warmup_steps :] or rates)
    peak = rates.index(top) + 1
    too_early = optim.warmup_steps >= LEAST_WARMUP and peak < EARLY * optim.warmup_steps
    still = len(list(itertools.takewhile(lambda rate: rate == rates[-1], reversed(rates))))
    too_long = rates[-1] == bottom < top and still > LONG_AT_THE_END * training.steps
    if not too_early and not too_long:
        return None
    warmup_text = f"the warm-up is {optim.warmup_steps} steps, and the rate peaks at step {peak}"
    ending = f"it then stays at {optim.lr * rates[-1]:.3g} for the last {still} of {training.steps} steps"
    fast = f"; {optim.warmup_steps / peak:.1f} times too fast" if too_early else ""
    finding = error if too_early else warning
    return finding("learning_rate", f"{warmup_text}; {ending}{fast}", per_batch, "a schedule shorter than the training")


# the first steps ------------------------------------------------------------------------------------------------------

REPEATED_STEPS = 5
LARGEST_WORK, LARGEST_WORK_ON_GPU = 1 << 40, 1 << 46
"""Parameters x tokens x 3 for each repeated step: a minute or two on one core."""
SAME_DEVICE, OTHER_DEVICE = 0.02, 0.1
"""Share by which norms may differ, on the run's type of device and on another."""


@dataclass(frozen=True)
class Gradient:
    """Gradient norms at one step. journal: as logged. own: of the objective. plain: of next-token cross entropy."""

    step: int
    journal: float
    own: float
    plain: float


def gradients(run: ExaminedRun) -> list[Gradient]:
    """Of the first steps in the journal. Raises NotExamined where they cannot be repeated."""
    config, logged = run.config, run.series("train/grad_norm")
    training = config.training
    size = 3 * sum(p.numel() for p in run.start.parameters()) * training.batch_tokens
    largest = LARGEST_WORK if run.device.type == "cpu" else LARGEST_WORK_ON_GPU
    count = min(REPEATED_STEPS, training.steps, largest // size)
    if not count:
        raise NotExamined(f"its steps are too large to be done again here ({training.batch_tokens:,} tokens)")
    if not set(logged) & set(range(1, count + 1)):
        raise NotExamined("no gradient norm of the first steps in its journal")
    if training.precision == "fp16":
        raise NotExamined("fp16 scales its gradients")
    if int(run.stack.get("ranks", 1)) > 1 and config.model.dropout:
        raise NotExamined("several ranks with dropout")
    return [Gradient(step, logged[step], *again) for step, again in repeated_steps(run, count) if step in logged]


def repeated_steps(run: ExaminedRun, count: int) -> Iterator[tuple[int, tuple[float, float]]]:
    """Train the first `count` steps; -> step, what `norms` finds there."""
    config, training = run.config, run.config.training
    model = run.build()
    state = TrainState(model, build_optimizers(config.optim, model.params()))
    batches = batches_of(config, run.data)
    set_arithmetic(training.precision, run.device, training.deterministic)
    optim = optim_of(config, batches)
    trained: Any = steps(state, batches, optim, training, seed=config.seed, stop_at=count, late=False)
    model.train()
    for step in range(count):
        inputs, targets = (torch.as_tensor(x, device=run.device) for x in batches.at(step))
        yield step + 1, norms(run, model, inputs, targets, step)
        next(trained)
    trained.close()


def norms(run: ExaminedRun, model: GPT, inputs: Tensor, targets: Tensor, step: int) -> tuple[float, float]:
    """Norms of the mean gradient of a whole batch (n, T): of the objective, and of the plain loss."""
    size = run.config.training.micro_batch_sequences or len(inputs)
    parameters = [p for p in model.parameters() if p.requires_grad]
    objective_sums, loss_sums = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    counted = (targets != -100).sum().item()
    for micro, start in enumerate(range(0, len(inputs), size)):
        x, y = inputs[start : start + size], targets[start : start + size]
        share = (y != -100).sum().item() / counted
        for sums, objective in ((objective_sums, True), (loss_sums, False)):
            reseed(run.config.seed, step, micro, 0, run.device)
            with autocast(run.config.training.precision, run.device):
                if objective:
                    loss = model.objective(x, y)[0]
                else:  # by torch's own function
                    loss = F.cross_entropy(model(x).float().flatten(0, 1), y.flatten())
            for total, part in zip(sums, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
                if part is not None:
                    total.add_(part, alpha=share)
    return tuple(float(torch.nn.utils.get_total_norm(sums)) for sums in (objective_sums, loss_sums))  # type: ignore[return-value]


def gradient(run: ExaminedRun) -> Finding | None:
    """The gradient of a step is the mean over its batch, without remains of earlier batches."""
    steps_again, training = gradients(run), run.config.training
    first = steps_again[0]
    sequences = training.batch_tokens // run.config.model.block_size
    count = math.ceil(sequences / (training.micro_batch_sequences or sequences))
    for norm, of in ((first.own, "the mean objective"), (first.plain, "the mean loss")):
        if count > 1 and math.isclose(first.journal, count * norm, rel_tol=OTHER_DEVICE):
            return error(
                "accumulation",
                f"the gradient of step {first.step} has norm {first.journal:.4g}, {first.journal / norm:.2f} "
                f"times that of {of} over its batch ({norm:.4g}), and a step has {count} micro-batches",
                "the loss of a micro-batch is not divided by their number",
            )
    same_device = run.stack.get("device", run.device.type) == run.device.type
    for at in steps_again:
        if not math.isclose(at.journal, at.own, rel_tol=SAME_DEVICE if same_device else OTHER_DEVICE):
            before = f"; that of step {first.step} agreed" if at is not first else ""
            return error(
                "gradient",
                f"the gradient of step {at.step} has norm {at.journal:.4g} in the journal, and that of its "
                f"batch alone has {at.own:.4g}{before}",
                "gradients that are not zeroed between steps",
                "code that changed since the run",
            )
    return None


# probes of the model --------------------------------------------------------------------------------------------------

LEAK = 1e-4
"""Tolerance relative to the logits; rounding changes them by about 1e-6."""
UNEVEN = 0.01
"""Share by which sums of attention weights may differ."""
LEARNED = 0.3
"""Nats by which training must have improved one target more than another to have learned it."""
OFF_SCALE = 1.5
"""Tolerated ratio of the factor on dot products; wrong ones differ by the square root of some width."""
TOO_LARGE = 1.25
"""Tolerated ratio to GPT-2's scale of residual output matrices; without scaling it is 1.4 with one layer."""


@torch.no_grad()
def causality(run: ExaminedRun) -> Finding | None:
    """Changing later tokens does not change the logits of earlier ones."""
    model = run.newest
    tokens = run.tokens[:, :-1]
    middle = tokens.shape[1] // 2
    changed = tokens.clone()
    changed[:, middle:] = tokens[:, middle:].flip(0, 1)
    before, after = model(tokens)[:, :middle], model(changed)[:, :middle]  # (B, T / 2, V)
    moved = (before - after).abs().amax((0, 2)) / before.square().mean().sqrt()  # (T / 2,)
    if not moved.max() > LEAK:
        return None
    touched = int((moved > LEAK).sum())
    return error(
        "causality",
        f"changing the tokens from position {middle} on moved the logits of {touched} of the {middle} "
        f"positions before it, by up to {moved.max():.2g} times their size",
        "a causal mask that is off by one, or missing",
        "a softmax, norm or mean over the tokens of a sequence",
        "an embedding or convolution that reads ahead",
    )


class Constant(CrossLayer):
    """Replaces the values of attention by a constant."""

    def __init__(self, value: float) -> None:
        nn.Module.__init__(self)
        self.constant = value

    def mix_values(self, depth: int, v: Tensor, step: object) -> Tensor:
        return torch.full_like(v, self.constant)


@torch.no_grad()
def softmax_rows(run: ExaminedRun) -> Finding | None:
    """Attention weights of a query sum to one: with constant values, all outputs must be equal."""
    model = run.newest
    for choice in run.config.model.scores:
        if choice.options.get("gate") or choice.options.get("sink_logits"):
            raise NotExamined(f"scores {choice} weigh what a query reads")
    for part in model.modules():
        if isinstance(part, Scores) and type(part).weights is not Scores.weights:
            raise NotExamined(f"{type(part).__name__} has weights other than those of a softmax")
        if isinstance(part, Scores) and type(part).finish is not Scores.finish:
            raise NotExamined(f"{type(part).__name__} changes what a query reads")
    tokens = run.tokens[:, :-1]
    with_ones, with_zeros = (read_by_attention(model, tokens, value) for value in (1.0, 0.0))
    for layer, (ones, zeros) in enumerate(zip(with_ones, with_zeros, strict=True)):
        sums = (ones - zeros).norm(dim=-1)  # (B, T), up to a factor that is the same for all
        if not sums.max() > 0:
            continue
        low, high = (sums.min() / sums.max()).item(), 1.0
        if high - low > UNEVEN:
            return error(
                "softmax_rows",
                f"in block {layer} the attention weights of some queries sum to {low:.3g} times those of "
                "others; each should sum to one",
                "a softmax along another axis than the keys",
                "weights masked after the softmax",
            )
    return None


def read_by_attention(model: GPT, tokens: Tensor, value: float) -> list[Tensor]:
    """Output of every block's attention when all values are `value`.  -> (B, T, C) for each block"""
    outputs: list[Tensor] = []
    hooks = [
        block.attn.register_forward_hook(lambda _, __, out: outputs.append(out.float()))  # type: ignore[union-attr]
        for block in model.h
        if block.attn is not None
    ]
    try:
        step = model.context(tokens)
        step.stack = [*step.stack, Constant(value)]
        model.hidden(step)
    finally:
        for hook in hooks:
            hook.remove()
    return outputs


class Scale:
    """Observer of the factor by which attention multiplies dot products, by block call."""

    def __init__(self) -> None:
        self.found: dict[int, tuple[float, int]] = {}

    def stream(self, depth: int, x: Tensor) -> None:
        """Ignored."""

    def attention(self, depth: int, q: Tensor, k: Tensor, bias: Tensor, scores: Scores, scale: float) -> None:
        """Record the factor and D."""
        q, k = q.float(), k.float()
        plain, scaled = q @ k.mT, score_map(q, k, torch.zeros((), device=q.device), scores, scale)
        self.found[depth] = (float(scaled.norm() / plain.norm()), q.shape[-1])


@torch.no_grad()
def attention_scale(run: ExaminedRun) -> Finding | None:
    """Dot products of queries and keys are divided by sqrt(D), unless the config says otherwise."""
    observer, pattern = Scale(), run.config.model.scores
    step = run.start.context(run.tokens[:, :-1])
    step.observer = observer
    run.start.hidden(step)
    if not observer.found:
        raise NotExamined("its attention does not show its scores")
    for depth, (factor, size) in observer.found.items():
        written = pattern[depth % len(pattern)].options.get("scale")
        expected = (size**-0.5 if written is None else float(written)) * step.score_factor
        if not expected / OFF_SCALE < factor < expected * OFF_SCALE:
            largest = run.series("diag/attention_logit_max")
            grown = f"; the largest score of the run is {max(largest.values()):.1f}" if largest else ""
            return error(
                "attention_scale",
                f"in block {depth} dot products are multiplied by {factor:.3g}, where 1/sqrt({size}) is "
                f"{size**-0.5:.3g}{grown}",
                "no 1/sqrt(D)",
                "the width of the model in the place of the head size",
                "a scale used twice",
            )
    return None


@torch.no_grad()
def targets(run: ExaminedRun) -> Finding | None:
    """Training increases the likelihood of the next token, not of the input token."""
    inputs, following = run.tokens[:, :-1], run.tokens[:, 1:]
    losses = {}
    for name, model in (("start", run.start), ("now", run.now)):
        logits = model(inputs).float().flatten(0, 1)
        losses[name] = [F.cross_entropy(logits, y.flatten()).item() for y in (inputs, following)]
    (own_then, next_then), (own, after) = losses["start"], losses["now"]
    if own > after or (own_then - own) - (next_then - after) < LEARNED:
        return None
    return error(
        "targets",
        f"training took the loss on the input token itself from {own_then:.3f} to {own:.3f} nats, and that on "
        f"the next token from {next_then:.3f} to {after:.3f}",
        "targets that are not shifted by one",
        "targets shifted the other way",
        "labels shifted twice",
    )


@torch.no_grad()
def tie(run: ExaminedRun) -> Finding | None:
    """Head and embedding that start tied stay tied."""
    then, now = ({p.role.kind: p.tensor for p in model.params()} for model in (run.start, run.now))
    if "head" not in then or then["head"].shape != then["embedding"].shape:
        return None
    if not torch.equal(then["head"], then["embedding"]) or torch.equal(now["head"], now["embedding"]):
        return None
    apart = float((now["head"] - now["embedding"]).norm() / now["embedding"].norm())
    return error(
        "tie",
        f"head and embedding began equal and are two tensors, by now {apart:.2f} of their size apart",
        "a tie that loading broke (new tensors in the place of one)",
        "a copy where a reference was meant",
    )


@torch.no_grad()
def decay(run: ExaminedRun) -> Finding | None:
    """Weight decay applies to matrices and tables, not to gains, biases or scalars."""
    twin = copy.deepcopy(run.start)
    optim = run.config.optim
    before = {param.name: param.tensor.clone() for param in twin.params()}
    for optimizer in build_optimizers(optim, twin.params()):
        for group in optimizer.param_groups:
            for tensor in group["params"]:
                tensor.grad = torch.zeros_like(tensor)
        step_of(optimizer, lambda: None)
    moved = [
        param for param in twin.params()
        if param.role.kind == "vector" and not torch.equal(before[param.name], param.tensor)
    ]  # fmt: skip
    if not moved:
        return None
    first = moved[0]
    share = float((first.tensor - before[first.name]).norm() / before[first.name].norm())
    return warning(
        "decay",
        f"with no gradient at all, a step at the peak rate takes {share:.1e} off {len(moved)} gains or biases "
        f"that are not zero, {first.name} the first{gains_now(run)}",
        "one parameter group for everything",
        "a list of exceptions that does not match the names of the norms",
    )


def gains_now(run: ExaminedRun) -> str:
    """The present mean of gains that began at 1, as a clause."""
    try:
        now = {param.name: param.tensor for param in run.now.params()}
    except NotExamined:
        return ""
    vectors = [p for p in run.start.params() if p.role.kind == "vector"]
    means = [now[p.name].mean().item() for p in vectors if bool((p.tensor == 1).all())]
    return f"; gains that began at 1 are {statistics.fmean(means):.3f} on average now" if means else ""


@torch.no_grad()
def residual_scaling(run: ExaminedRun) -> Finding | None:
    """Residual output matrices start smaller than the others, by 1/sqrt(2 L)."""
    if not run.start.h[-1].final_norm:
        raise NotExamined("its blocks normalise the stream, or scale what they add to it, themselves")
    if "even" in SLOTS["init"][run.config.model.init.name].can:
        raise NotExamined(f"{run.config.model.init} starts all matrices alike on purpose")
    params = run.start.params()
    written = [p for p in params if p.role.kind == "residual_out" and p.role.gain is None]
    hidden = [p for p in params if p.role.kind == "hidden" and p.role.layer is not None]
    if not written or not hidden:
        return None
    ratio, usual = spread(written) / spread(hidden), (2 * run.config.model.n_layer) ** -0.5
    if ratio <= TOO_LARGE * usual:
        return None
    metrics: dict[str, float] = next((dict(row["metrics"]) for row in run.rows if row["step"] == 0), {})
    rms = {int(k.rpartition("/")[2]): v for k, v in metrics.items() if k.startswith("diag/activation_rms/")}
    grown = f"; the stream grows from {rms[min(rms)]:.3f} to {rms[max(rms)]:.3f} rms through the blocks" if rms else ""
    return warning(
        "residual_scaling",
        f"matrices that write into the stream start {ratio:.2f} times as large as the others, and 1/sqrt(2 L) "
        f"is {usual:.2f}{grown}",
        "the scaling of GPT-2's initialisation left out",
        "a rule on names that matches no matrix",
    )


def spread(params: Sequence[Param]) -> float:
    """Root mean square over all entries."""
    squares = sum(float(param.tensor.double().square().sum()) for param in params)
    return math.sqrt(squares / sum(param.tensor.numel() for param in params))


Check = Callable[[ExaminedRun], Finding | None]
CHECKS: tuple[Check, ...] = (
    checkpoint, loss_at_start, impossible_loss, learned_nothing, learning_rate, gradient,
    causality, softmax_rows, attention_scale, targets, tie, decay, residual_scaling,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Examination:
    """Findings about one run. sound: checks that found nothing. unknown: check -> why it does not apply."""

    run: str
    status: str
    step: int
    findings: Sequence[Finding]
    sound: Sequence[str]
    unknown: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**vars(self), "findings": [finding.to_json() for finding in self.findings]}


def examine(folder: RunFolder, *, progress: Callable[[str], None] | None = None) -> Examination:
    """Run every check on a run; the plug-ins of its components must be loaded before.

    Raises ConfigError when there is no such run, DataFault when its files are damaged.
    """
    run = ExaminedRun.load(folder)
    findings, sound, unknown = [], [], {}
    for check in CHECKS:
        if progress:
            progress(check.__name__)
        try:
            finding = check(run)
        except NotExamined as reason:
            unknown[check.__name__] = str(reason)
            continue
        if finding is None:
            sound.append(check.__name__)
        else:
            findings.append(finding)
    return Examination(
        run=folder.id, status=folder.status(), step=run.step, findings=findings, sound=sound, unknown=unknown
    )
