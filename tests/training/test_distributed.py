"""Two gloo ranks against one process, in one pair of processes."""

from __future__ import annotations

import math
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo  # which DDP wants: ranks are forked after it
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import start_processes
from trainings import BLOCK, VOCABULARY, RandomBatches, Twice, fresh, train, weights

from gpt2lab.errors import ConfigError, NumericsFault
from gpt2lab.evaluation.validation import EvaluationConfig, evaluate_by_window
from gpt2lab.optim import OptimConfig
from gpt2lab.training import TrainState, World
from gpt2lab.training.distributed import Replica
from gpt2lab.training.ranks import require_equal

OPTIM = OptimConfig(lr=0.5, warmup_steps=2)
UNEVEN = RandomBatches(ignore=15)  # targets that do not count are all in one half of the global batch


def with_sgd(kind: type[torch.optim.SGD] = torch.optim.SGD) -> TrainState:
    state = fresh(OPTIM)  # Adam would amplify rounding of gradients that are zero
    state.optimizers = [kind(state.model.parameters(), lr=OPTIM.lr)]
    state.optimizers[0].param_groups[0]["base_lr"] = OPTIM.lr
    return state


def trained(world: World) -> dict[str, Any]:
    """Everything that must agree between one process and two."""
    state, ahead = with_sgd(), with_sgd(Twice)  # gradients at other weights, from all ranks
    records, _ = (train(s, OPTIM, UNEVEN, world=world, micro_batch_sequences=3) for s in (state, ahead))
    tokens = np.random.default_rng(5).integers(0, VOCABULARY, 101)
    config = EvaluationConfig(tokens=100, contexts=(0.5, 1), context_tokens=48)
    how: dict[str, Any] = {"byte_lengths": np.arange(VOCABULARY), "world": world}
    record, _ = evaluate_by_window(state.model, tokens, config, block_size=BLOCK, batch_sequences=2, **how)  # type: ignore[arg-type]
    return {
        "loss": torch.tensor([r.metrics["train/loss"] for r in records]),
        "norm": torch.tensor([r.metrics["train/grad_norm"] for r in records]),
        "tokens": torch.tensor([r.tokens for r in records]),
        "weights": weights(state),
        "ahead": weights(ahead),
        "validation": torch.tensor([*record["metrics"].values(), record["targets"]]),
        "contexts": torch.tensor([*record["contexts"].values()]),
    }


def infinite_on_rank_1(world: World) -> dict[str, Any]:
    """Only rank 1 meets an infinite gradient, in its third step; what each rank then has."""
    state = with_sgd()
    calls = iter(range(100))

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * math.inf if next(calls) == 2 and world.rank == 1 else gradient

    next(state.model.parameters()).register_hook(spoil)
    stopped = ""
    try:
        train(state, OPTIM, UNEVEN, world=world)
    except NumericsFault as fault:
        stopped = str(fault)
    return {"stopped": stopped, "step": state.step, "weights": [p.detach() for p in state.model.parameters()]}


class Sparse(nn.Module):
    """Of its parameters ranks use different ones, as with experts: all, rank 0 alone (in its first micro-batch only, or
    in its last), or none."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world, self.calls = world, 0
        self.shared, self.early, self.late, self.idle = (nn.Parameter(torch.ones(2)) for _ in range(4))

    def params(self) -> list[Any]:
        return [SimpleNamespace(role=SimpleNamespace(active=0.5))]

    def objective(self, inputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        self.calls += 1
        total = self.shared.sum() * (1 + 2 * self.world.rank)
        if self.world.rank == 0:
            total = total + 4 * (self.early if self.calls == 1 else self.late).sum()
        return total, {"loss": total}


def unequal_use(world: World) -> list[Any]:
    """Gradients of two micro-batches after they were joined."""
    model = Sparse(world)
    replica = Replica(model, world)
    for last in (False, True):
        with replica.accumulating(last):
            replica(torch.zeros(1), torch.zeros(1))[0].backward()
    return [None if p.grad is None else p.grad.tolist() for p in model.parameters()]


def talk(world: World) -> list[Any]:
    """What ranks exchange."""
    world.barrier()
    return [world.any(world.rank == 1), world.any(False), world.gather({"rank": world.rank})]


def disagreement(world: World) -> str:
    """The refusal of ranks that differ in one of three facts, and in one that a rank has not."""
    require_equal(world, {"model.n_layer": 2})
    facts = {"optim.lr": 0.1 * (1 + world.rank), "core": "abc", **({"extra": 1} if world.rank else {})}
    try:
        require_equal(world, facts)
    except ConfigError as error:
        return error.render()
    return ""


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", rendezvous, timedelta(seconds=60), world_size=2, rank=rank)
    world = World(rank, 2)
    result = {"trained": trained(world), "infinite": infinite_on_rank_1(world), "unequal": unequal_use(world)}
    result |= {"talk": talk(world), "disagreement": disagreement(world)}
    torch.save(result, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both ranks found; the only place where processes are started."""
    folder = tmp_path_factory.mktemp("ranks")
    context = start_processes(work, args=(str(folder),), nprocs=2, join=False, start_method="fork")
    try:
        for _ in range(2):
            if context.join(timeout=60):
                break
        else:
            pytest.fail("the ranks did not end in time")
    finally:
        for process in context.processes:
            process.kill()
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def test_two_ranks_train_as_one_process_does(ranks: list[dict[str, Any]]) -> None:
    alone = trained(World())
    for rank in ranks:
        for name, value in rank["trained"].items():
            torch.testing.assert_close(value, alone[name], rtol=0, atol=1e-6, msg=name)
    assert all(torch.equal(ranks[0]["trained"][name], ranks[1]["trained"][name]) for name in alone)
    assert (alone["weights"] - weights(fresh())).norm() > 0.3


def test_an_infinite_gradient_on_one_rank_stops_all_in_the_same_step(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["infinite"]["step"] == 2
        assert rank["infinite"]["stopped"].startswith("training: step 3: loss")
    first, second = (rank["infinite"]["weights"] for rank in ranks)
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(first, second, strict=True))


def test_unused_parameters_count_as_zero_or_stay_without_gradient(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["unequal"] == [[4.0, 4.0], [2.0, 2.0], [2.0, 2.0], None]


def test_ranks_exchange_values(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["talk"] == [True, False, [{"rank": 0}, {"rank": 1}]]


def test_the_refusal_of_ranks_that_differ_names_the_difference(ranks: list[dict[str, Any]]) -> None:
    assert [rank["disagreement"] for rank in ranks] == [
        "gpt2lab: error [CONFIG] optim.lr: differs between ranks; rank 0: 0.1; rank 1: 0.2\n"
        "gpt2lab: error [CONFIG] extra: differs between ranks; rank 0: nothing; rank 1: 1\n"
        "try: start every rank with the same command, code, files and packages"
    ] * 2


def test_one_process_needs_no_process_group() -> None:
    assert not dist.is_initialized()
    values = torch.tensor([1.0, 2.0])
    assert World().sum(values) is values
    assert World().mean(values) is values
    assert (World().any(True), World().any(False), World().gather("here")) == (True, False, ["here"])
    World().barrier()
    require_equal(World(), {"anything": 1})
