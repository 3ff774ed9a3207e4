"""From an ablation to its runs and costs: what is planned, what is refused, and what is declared."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from made_up_runs import end
from tiny_plan import ABLATION, Planned

from gpt2lab.data.prepared import Prepared, Tokens
from gpt2lab.errors import ConfigError, EnvironmentFault
from gpt2lab.evaluation.validation import evaluation_key
from gpt2lab.executors import local
from gpt2lab.executors.driver import executor_for
from gpt2lab.experiments.ablation import job_of
from gpt2lab.identity import run_id, run_identity
from gpt2lab.inspection.costs import matmul_flops
from gpt2lab.planning import machine
from gpt2lab.planning import plan as planning
from gpt2lab.planning import record as declaring
from gpt2lab.planning.machine import Machine, estimate_memory, estimate_speed, shares
from gpt2lab.planning.plan import check_data
from gpt2lab.planning.record import git_commit, study_record
from gpt2lab.runner import Job, StopRequest, execute
from gpt2lab.store import Store
from gpt2lab.training import TrainingConfig
from gpt2lab.training.precision import device_name

SECOND = (
    ABLATION.replace("ablation: tiny", "ablation: norms")
    .replace("rotary: {model.position: rotary}", "rmsnorm: {model.norm: rmsnorm}")
    .replace("rotary: better", "rmsnorm: equal")
)
CONTROLS = ABLATION.replace(
    "seeds: 2", "  again: {control: true}\n  rotary_again: {model.position: rotary, control: true}\nseeds: [0, 3]"
).replace("expected: {rotary: better}\n", "")


def test_runs_are_seed_major_and_named_by_their_identity(planned: Planned) -> None:
    plan = planned()
    assert [(run.arm, run.seed) for run in plan.runs()] == [
        ("learned", 0),
        ("rotary", 0),
        ("learned", 1),
        ("rotary", 1),
    ]
    for run in plan.runs():
        assert run.config == plan.arms[run.arm].arm.config.model_copy(update={"seed": run.seed})
        parts = run_identity(
            run.config, data=plan.data.fingerprint, device="cpu", threads=1, torch_version=torch.__version__
        )
        assert run.identity == parts and run.id == run_id(parts)
    assert len({run.id for run in plan.runs()}) == 4
    assert plan.baseline is plan.arms["learned"]


def test_control_arms_draw_fresh_seeds_of_their_own(planned: Planned) -> None:
    plan = planned(CONTROLS)
    seeds = {name: [run.seed for run in arm.runs] for name, arm in plan.arms.items()}
    assert seeds == {"learned": [0, 3], "rotary": [0, 3], "again": [500, 503], "rotary_again": [700, 703]}
    assert len({run.id for run in plan.runs()}) == 8
    fewer = planned(CONTROLS, arms=["learned", "rotary_again"])
    assert [run.id for run in fewer.arms["rotary_again"].runs] == [run.id for run in plan.arms["rotary_again"].runs]
    assert all(arm["control"] == ("again" in name) for name, arm in record_of(plan)["arms"].items())
    assert set(record_of(plan)["arms"]["again"]["runs"]) == {"500", "503"}


def test_ablations_share_the_runs_of_a_baseline(planned: Planned) -> None:
    first, second = planned(), planned(SECOND, overrides=["evaluation.tokens=128"])
    assert [run.id for run in first.baseline.runs] == [run.id for run in second.baseline.runs]
    own = {run.id for run in first.runs()} & {run.id for run in second.runs()}
    assert own == {run.id for run in first.baseline.runs}


def test_costs_tokens_and_estimates(planned: Planned) -> None:
    plan = planned()
    learned, rotary = plan.arms["learned"], plan.arms["rotary"]
    assert learned.tokens == rotary.tokens == 24 * 64
    assert learned.costs.parameters - rotary.costs.parameters == 16 * 16  # the table of positions
    for arm in plan.arms.values():
        assert arm.seconds == pytest.approx(arm.costs.flops_per_token * arm.tokens / plan.machine.speed)
        assert arm.memory > 16 * arm.costs.parameters
        assert arm.seconds > 0
    assert (plan.machine.device, plan.machine.threads, plan.machine.jobs) == ("cpu", 1, 4)
    assert plan.machine.speed > 1e6 and "probe" in plan.machine.speed_from
    assert plan.machine.device_name


def test_memory_grows_with_what_is_kept(planned: Planned) -> None:
    def memory(**training: Any) -> int:
        plan = planned()
        arm = plan.arms["learned"]
        config = arm.arm.config
        return estimate_memory(config.model_copy(update={"training": config.training.model_copy(update=training)}),
                               arm.costs, plan.machine)  # fmt: skip

    plain = memory()
    assert (
        memory(batch_tokens=128)
        > plain
        > memory(micro_batch_sequences=1)
        > memory(micro_batch_sequences=1, precision="bf16")
    )


# Speed from finished runs.


def finished(
    root: Path, name: str, *, cost: float, speed: float | None, device: str = "cpu", threads: int = 1,
    precision: str = "fp32", processor: str = "", compiled: bool = False,
) -> None:  # fmt: skip
    folder = Store(root).run(name * 16)
    result = {
        "status": "finished",
        "flops_per_token": cost,
        "tokens_per_second": speed,
        "stack": {"device_name": processor} if processor else {},
    }
    trained = {"settings": {"training": {"precision": precision}}, "compiled": compiled}
    end(folder, result, device=device, threads=threads, **trained)


def test_speed_comes_from_finished_runs_like_these(tmp_path: Path) -> None:
    cpu, store = torch.device("cpu"), Store(tmp_path)
    assert "probe" in estimate_speed(store, cpu, 1, 1e6, TrainingConfig())[1]
    finished(tmp_path, "a", cost=1e9, speed=1.0)  # too large to be like these
    finished(tmp_path, "b", cost=1e3, speed=1.0)  # too small
    finished(tmp_path, "c", cost=1e6, speed=77.0, device="cuda", threads=0)
    finished(tmp_path, "d", cost=1e6, speed=77.0, threads=2)
    finished(tmp_path, "e", cost=1e6, speed=None)
    finished(tmp_path, "6", cost=1e6, speed=77.0, precision="bf16")
    finished(tmp_path, "7", cost=1e6, speed=77.0, processor="another")
    finished(tmp_path, "8", cost=1e6, speed=77.0, compiled=True)
    Store(tmp_path).run("f" * 16).fail({"reason": "it broke"})
    assert "probe" in estimate_speed(store, cpu, 1, 1e6, TrainingConfig())[1]
    for name, speed in (("1", 100.0), ("2", 300.0), ("3", 200.0)):
        finished(tmp_path, name, cost=2e6, speed=speed, processor=device_name(cpu) if speed > 100 else "")
    assert estimate_speed(store, cpu, 1, 1e6, TrainingConfig()) == (200.0 * 2e6, "3 finished runs here")
    assert estimate_speed(store, cpu, 1, 1e6, TrainingConfig(compile="on")) == (77.0 * 1e6, "1 finished run here")


def test_the_probe_leaves_the_number_of_threads_as_it_was() -> None:
    before = torch.get_num_threads()
    assert matmul_flops(torch.device("cpu"), "fp32", before + 1, 64) > 0
    assert torch.get_num_threads() == before


# Jobs and threads.


@pytest.mark.parametrize(
    ("jobs", "threads", "cores", "device", "found"),
    [
        (None, 1, 8, "cpu", (8, 1)),
        (None, 3, 8, "cpu", (2, 3)),
        (None, None, 8, "cpu", (8, 1)),
        (2, None, 8, "cpu", (2, 4)),
        (3, None, 8, "cpu", (3, 2)),
        (2, 4, 8, "cpu", (2, 4)),
        (1, 1, 1, "cpu", (1, 1)),
        (None, None, 8, "mps", (1, 8)),
        (None, None, 8, "cuda", (4, 2)),
        (None, None, 2, "cuda", (4, 1)),
        (8, 1, 2, "cuda", (8, 1)),
    ],
)
def test_jobs_and_threads_share_the_cores(
    jobs: int | None,
    threads: int | None,
    cores: int,
    device: str,
    found: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert shares(jobs, threads, cores, device) == found


@pytest.mark.parametrize(
    ("jobs", "threads", "said", "hint"),
    [
        (3, 3, "--jobs: 3 jobs of 3 threads need 9 cores, 8 can be used here", "--jobs 2"),
        (9, None, "--jobs: 9 jobs of 1 threads need 9 cores, 8 can be used here", "--jobs 8"),
        (None, 9, "training.threads: 9 threads in each run, 8 cores can be used here", "--set training.threads=8"),
        (1, 9, "training.threads: 9 threads in each run, 8 cores can be used here", "--set training.threads=8"),
    ],
)
def test_more_threads_than_cores_are_refused_with_what_fits(
    jobs: int | None, threads: int | None, said: str, hint: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        shares(jobs, threads, 8, "cpu")
    assert str(refused.value) == said and refused.value.hint == hint
    key, equals, value = hint.removeprefix("--set ").partition("=")
    better = shares(jobs, int(value), 8, "cpu") if equals else shares(int(key.split()[1]), threads, 8, "cpu")
    assert better[0] * better[1] <= 8


def test_a_plan_refuses_what_the_machine_lacks(planned: Planned) -> None:
    with pytest.raises(ConfigError, match=r"--jobs: 5 jobs of 1 threads need 5 cores, 4 can be used here"):
        planned(jobs=5)
    with pytest.raises(EnvironmentFault, match=r"training.device: this torch .* finds no mps device"):
        planned(overrides=["training.device=mps"])


# Data.


def cut(data: Prepared, train: int, validation: int) -> Prepared:
    """The same data, made shorter."""

    def short(tokens: Tokens, length: int) -> Tokens:
        return Tokens([(tokens.paths[0], length)], tokens.dtype, tokens.vocab_size)

    return dataclasses.replace(data, train=short(data.train, train), validation=short(data.validation, validation))


def test_data_that_does_not_fit_is_refused_with_arm_key_and_next_step(planned: Planned) -> None:
    plan = planned()
    arm = plan.arms["rotary"].arm
    check_data(arm, cut(plan.data, 17, 257))

    def refused(data: Prepared, arm: Any = arm) -> tuple[list[str], str | None]:
        with pytest.raises(ConfigError) as error:
            check_data(arm, data)
        return [str(problem) for problem in error.value.problems], error.value.hint

    assert refused(cut(plan.data, 17, 256)) == (
        ["arm rotary: evaluation.tokens: the validation split needs 257 tokens, has 256"],
        "--set evaluation.tokens=255",
    )
    assert refused(cut(plan.data, 16, 257)) == (
        ["arm rotary: model.block_size: the training split needs 17 tokens, has 16"],
        "--set model.block_size=15",
    )
    small = arm.config.model_copy(update={"model": arm.config.model.model_copy(update={"vocab_size": 200})})
    narrow = dataclasses.replace(arm, config=small)
    assert refused(plan.data, narrow) == (
        ["arm rotary: model.vocab_size: the tokenizer has 256 tokens, the model rows for 200"],
        "--set model.vocab_size=256",
    )
    problems, hint = refused(cut(plan.data, 900, 10), narrow)
    assert [problem.split(": ")[1] for problem in problems] == [
        "model.block_size", "model.vocab_size", "evaluation.tokens",
    ]  # fmt: skip
    assert hint == "--set model.block_size=9 --set model.vocab_size=256 --set evaluation.tokens=9"


def test_a_plan_refuses_data_that_is_too_short(planned: Planned) -> None:
    with pytest.raises(ConfigError, match=r"evaluation\.tokens: the validation split needs 5001 tokens"):
        planned(overrides=["evaluation.tokens=5000"])


# The study record.

KEYS = {
    "format", "name", "ablation", "scale", "question", "baseline", "arms", "contrasts", "seeds", "metric",
    "smallest_effect", "alpha", "equalise", "equalise_by", "bracketed", "screen", "evaluation", "floors", "scope",
    "caveat", "stack", "reproduce", "created", "hash", "design", "expected", "factors", "baseline_seeds", "looks",
    "lr_bracket", "budgets",
    "tokens_per_parameter", "noise", "noise_command", "left_out", "mistakes", "tune", "earlier", "history",
    "undeclared_look", "judged_contexts", "confirm", "screened", "validation_text", "campaign", "ledger",
}  # fmt: skip
ARM_KEYS = {
    "changes", "components", "runs", "parameters", "non_embedding_parameters", "active_parameters", "flops_per_token",
    "tokens", "expected", "control", "exploratory", "moves_rate", "not_comparable", "settings", "bracket", "curve",
    "lr",
    "adjustment", "tuned", "shared",
}  # fmt: skip


def record_of(plan: planning.Plan, reproduce: str = "gpt2lab run ablation.yaml") -> dict[str, Any]:
    return study_record(plan, reproduce=reproduce).plain()


def test_the_study_record_declares_everything(planned: Planned) -> None:
    plan = planned()
    record = record_of(plan)
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record.keys() == KEYS
    assert all(arm.keys() == ARM_KEYS for arm in record["arms"].values())
    assert record["stack"].keys() == {"torch", "device", "device_name", "python", "platform", "git_commit"}
    assert (record["name"], record["ablation"], record["scale"], record["baseline"]) == (
        "tiny@tiny", "tiny", "tiny", "learned",
    )  # fmt: skip
    assert record["contrasts"] == [["rotary", "learned"]] and record["seeds"] == [0, 1]
    assert (record["smallest_effect"], record["alpha"], record["equalise"]) == (0.05, 0.05, "tokens")
    assert record["caveat"] == "early training: sign only"
    assert record["floors"].keys() == {"unigram", "bigram"}
    evaluation = record["evaluation"]
    assert evaluation.pop("key") == evaluation_key(evaluation)
    assert evaluation == {"tokens": 256, "contexts": [0.5, 1.0, 2.0], "block_size": 16, "context_tokens": 64}
    rotary = record["arms"]["rotary"]
    assert rotary["changes"] == {"model.position": "rotary"} and rotary["expected"] == "better"
    assert rotary["runs"] == {str(run.seed): run.id for run in plan.arms["rotary"].runs}
    assert rotary["components"]["position"] == "rotary" and rotary["components"]["optimizer"] == "adamw"
    assert rotary["components"]["stack"] == "none"
    assert rotary["tokens"] == 24 * 64 and rotary["exploratory"] is None


def test_the_scope_says_where_results_hold_without_this_machines_paths(planned: Planned) -> None:
    plan = planned(overrides=["optim.optimizer.weight_decay=0"])
    record = record_of(plan)
    assert record["scope"] == {
        "preset": "tiny", "parameters": plan.baseline.costs.parameters, "tokens": 1536, "data": "text (bytes)",
        "optimizer": "adamw(weight_decay=0.0), lr 0.01",
    }  # fmt: skip
    assert str(plan.data.path.parent) not in json.dumps(record)


def test_the_hash_is_of_what_is_declared_and_of_nothing_else(planned: Planned, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned()
    first = record_of(plan)
    monkeypatch.setattr(declaring, "now", lambda: "2031-01-01T00:00:00+00:00")
    monkeypatch.setattr(declaring, "git_commit", lambda: "0123456789ab")
    later = record_of(plan)
    assert later["created"] != first["created"] and later["stack"] != first["stack"]
    assert later["hash"] == first["hash"] and re.fullmatch("[0-9a-f]{64}", later["hash"])
    for text, old, new in (
        (ABLATION, "Does", "How does"), (ABLATION, "seeds: 2", "seeds: 3"), (ABLATION, "better", "worse"),
        (ABLATION + "alpha: 0.01", "", ""), (ABLATION + "smallest_effect: 0.01", "", ""),
    ):  # fmt: skip
        assert record_of(planned(text.replace(old, new) if old else text))["hash"] != first["hash"]


def test_what_is_said_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_name(torch.device("cpu"))
    monkeypatch.chdir(tmp_path)
    assert git_commit() is None
    monkeypatch.setenv("PATH", str(tmp_path))  # no git at all
    assert git_commit() is None


def test_costs_are_remembered_and_a_damaged_memory_is_not_believed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from gpt2lab.config import load_config
    from gpt2lab.planning import runs as plan

    monkeypatch.setenv("GPT2LAB_DATA", str(tmp_path))
    config = load_config("nano")
    counted = plan.known_costs(config)
    [file] = (tmp_path / "costs").iterdir()
    monkeypatch.setattr(plan, "costs", lambda _: pytest.fail("counted again"))
    assert plan.known_costs(config) == counted
    file.write_text("{")
    monkeypatch.setattr(plan, "costs", lambda _: counted)
    assert plan.known_costs(config) == counted
    assert len(list((tmp_path / "costs").iterdir())) == 1
    plan.known_costs(load_config("nano", ["model.mlp=swiglu"]))
    assert len(list((tmp_path / "costs").iterdir())) == 2


# GPUs, as far as they can be tested without one.


def test_more_runs_than_gpus_share_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three runs at once on two GPUs: the third is on the first GPU again, not on one that is not there."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    seen: list[str] = []
    monkeypatch.setattr(
        local, "started", lambda start, job, **environment: seen.append(environment["CUDA_VISIBLE_DEVICES"])
    )
    here = Machine("cuda", "a GPU", 1, 3, 1e12, "a test", gpus=2)
    executor = executor_for(here)
    for name in "abc":
        executor.submit(Job(str(tmp_path), name * 16, "", {}, "", 1.0, 1))
    assert seen == ["0", "1", "0"]


def test_a_run_that_was_planned_for_a_gpu_is_refused_without(
    planned: Planned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name says cuda; on a CPU it would be another run."""
    plan = planned()
    store = Store(tmp_path / "elsewhere")
    job: Any = job_of(plan.runs()[0], store, plan)
    moved = Job(**{**vars(job), "identity": {**job.identity, "device": "cuda"}})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EnvironmentFault, match="planned on cuda, but this process finds cpu alone"):
        execute(moved, StopRequest())
    assert not store.run(job.run_id).rows()


def test_a_gpus_step_takes_at_least_as_long_as_asking_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "matmul_flops", lambda device, precision, threads, size: 8e14 if size > 4096 else 1e12)
    store, cuda = Store(tmp_path), torch.device("cuda")
    large = estimate_speed(store, cuda, 1, 1e9, TrainingConfig(batch_tokens=524_288))[0]
    assert large == pytest.approx(4e14, rel=0.02)
    small = estimate_speed(store, cuda, 1, 5e6, TrainingConfig(batch_tokens=1024))[0]
    assert 5e6 * 1024 / small == pytest.approx(machine.GPU_STEP_SECONDS, rel=0.01)
