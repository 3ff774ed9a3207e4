"""Several ranks for one run: they train as one process does, agree on when to stop, and end together when one is lost.

Ranks are forked from this process, which has imported torch.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import pytest
import torch
import torch._dynamo  # which optimizers and DDP import late: ranks are forked after it
from safetensors.torch import load_file
from tiny import WORDS, write_text
from workers import ForkedRank, folder_of, is_alive, rows_of, wait_until

from gpt2lab.config import load_config
from gpt2lab.data.shards import prepare
from gpt2lab.errors import Gpt2labError, Preempted
from gpt2lab.evaluation.tasks import GREEDY, PERPLEXITY, Task, complete, task, written
from gpt2lab.executors.ranks import RanksExecutor
from gpt2lab.executors.scheduler import Scheduler
from gpt2lab.experiments.single import error_of
from gpt2lab.planning.ablation import Arm
from gpt2lab.planning.machine import Machine
from gpt2lab.planning.runs import make_run
from gpt2lab.runner import Job, StopRequest, work

STEPS = 12
TINY = """
model: {{n_layer: 2, n_head: 2, n_embd: 16, block_size: 16, vocab_size: 256}}
data: {{corpus: {{name: text, paths: ["{text}"]}}, tokenizer: bytes, validation_fraction: 0.2}}
optim: {{lr: 1e-2, warmup_steps: 4}}
training: {{steps: {steps}, batch_tokens: 256, threads: 1, checkpoint_every_steps: 4, device: cpu}}
evaluation: {{every_steps: 6, tokens: 256}}
"""
ENDLESS = "training.steps=5000"
SECONDS = 60.0  # after which a test gives up

Jobs = Callable[..., Job]
Ranks = list[ForkedRank]


@pytest.fixture(scope="module")
def make_job(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """Makes the job of a run, in a store of its own."""
    home = tmp_path_factory.mktemp("data")
    preset = home / "tiny.yaml"
    preset.write_text(TINY.format(text=write_text(home / "text.txt"), steps=STEPS))

    def make(*overrides: str) -> Job:
        config = load_config(preset, overrides)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("GPT2LAB_DATA", str(home))
            data = prepare(config.data)
        run = make_run(Arm("tiny", {}, config), 0, data, Machine("cpu", "cpu", 1, 1, 1e9, "a test"))
        store = tmp_path_factory.mktemp("runs")
        return Job(str(store), run.id, run.config.to_yaml(), run.identity, str(data.path), 1e6, 1)

    return make


@dataclass
class Trained:
    """A run's ending or the error that was raised, after how many seconds, and each rank's exit code, as far as it
    ended by itself."""

    ending: str
    error: Gpt2labError | None
    seconds: float
    codes: list[int | None]


def train(
    job: Job, count: int = 2, fault: str = "", jobs: Mapping[str, Job] | None = None,
    on_tick: Callable[[Ranks], object] = lambda ranks: None,
    cancel_when: Callable[[Ranks], object] = lambda ranks: False,
    environment: Mapping[str, str] | None = None,
) -> Trained:  # fmt: skip
    """Train with forked ranks. jobs: those of some ranks, by number. on_tick: called several times a second.
    cancel_when: whether the run is to be cancelled by now. environment: over that which the executor gives."""
    ranks: Ranks = []

    def start(job: Job, given: Mapping[str, str], log: IO[str]) -> ForkedRank:
        ranks.append(ForkedRank((jobs or {}).get(given["RANK"], job), {**given, **(environment or {})}, log, fault))
        return ranks[-1]

    began, cancelled = time.monotonic(), False

    def tick() -> None:
        nonlocal cancelled
        assert time.monotonic() < began + SECONDS, "the ranks did not end in time"
        on_tick(ranks)
        if cancel_when(ranks):
            cancelled = True
            scheduler.cancel(job.run_id)

    executor = RanksExecutor(count, start)
    scheduler = Scheduler(executor, tick)
    ending, error = "", None
    try:
        ending = scheduler.run([job])[job.run_id]
        if ending == "preempted" and not cancelled:
            error = Preempted("stopped by a signal to a rank")
        if ending == "failed":
            error = error_of(folder_of(job).failure() or {}, folder_of(job))
    except Gpt2labError as raised:
        error = raised
    seconds = time.monotonic() - began
    for rank in ranks:
        with pytest.raises(ProcessLookupError):  # no orphans
            os.kill(rank.pid, 0)
    return Trained(ending, error, seconds, [rank.code for rank in executor._ranks])


def newest(job: Job) -> Path:
    return max(folder_of(job).checkpoints.iterdir())


def log_of(job: Job, name: str = "run.log") -> str:
    return (folder_of(job).path / name).read_text()


def final(job: Job) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of all steps, and the weights after them."""
    losses = [row["metrics"]["train/loss"] for row in folder_of(job).rows() if "train/loss" in row["metrics"]]
    return losses, load_file(newest(job) / "model.safetensors")


def outcome(job: Job) -> tuple[list[Any], dict[str, bytes]]:
    """All that equal runs share: journal and tensors of the newest checkpoint."""
    return rows_of(folder_of(job)), {file.name: file.read_bytes() for file in newest(job).glob("*.safetensors")}


@pytest.fixture(scope="module")
def undisturbed(make_job: Jobs) -> Job:
    """A run that two ranks trained from start to end."""
    job = make_job()
    assert train(job).ending == "done"
    return job


@pytest.mark.parametrize(
    "override",
    [
        "training.micro_batch_sequences=2",
        "model.mlp={name: moe, experts: 8}",
        pytest.param("data.batches=[{name: batch_ramp, multiple: 2}, easy_first]", marks=pytest.mark.slow),
    ],
    ids=["accumulation 4", "experts", "ramp"],
)
def test_two_ranks_train_as_one_process_does(make_job: Jobs, override: str) -> None:
    overrides = [override, "optim.optimizer={name: adamw, eps: 1e-3}"]  # less amplifies rounding of tiny gradients
    alone, together = make_job(*overrides), make_job(*overrides)
    assert alone.run_id == together.run_id
    assert work(alone, StopRequest()) == 0
    assert train(together).ending == "done"
    (losses, weights), (others, theirs) = final(alone), final(together)
    assert len(losses) == STEPS
    torch.testing.assert_close(others, losses, rtol=0, atol=1e-5)
    for name, value in weights.items():
        torch.testing.assert_close(theirs[name], value, rtol=0, atol=1e-5, msg=name)
    result = folder_of(together).result()
    assert result is not None and result["stack"]["ranks"] == 2
    assert [row["step"] for row in folder_of(together).rows()] == list(range(STEPS + 1))


def test_two_ranks_answer_the_questions_of_tasks_together(make_job: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    def own() -> Task:
        """How does it go on?"""
        rows = [{"word": word, "number": number} for number, word in enumerate(WORDS * 60)]
        ask = lambda row: complete(f"{row['number']} and", f" {row['word']}")  # noqa: E731
        return Task(protocol="a test", documents=lambda: written(rows), ask=ask, measures=(GREEDY, PERPLEXITY))

    monkeypatch.setattr(task, "_components", dict(task._components))
    task.register("own", source="a test")(own)
    overrides = ["evaluation.tasks=[own]", "evaluation.task_documents=600"]  # three batches
    alone, together = make_job(*overrides), make_job(*overrides)
    assert work(alone, StopRequest()) == 0
    assert train(together).ending == "done"
    values, others = (
        {row["step"]: row["metrics"]["task/own/perplexity"] for row in folder_of(job).rows() if row["step"] % 6 == 0}
        for job in (alone, together)
    )
    assert len(values) == 3 and values[0] == others[0]
    assert others == pytest.approx(values, rel=1e-4)


STALLS = "training.rank_timeout_seconds=1"


@pytest.mark.parametrize(
    ("fault", "override", "message", "exit_code", "codes"),
    [
        ("kill@backward:5,rank=1", ENDLESS, r"rank 1 died \(SIGKILL\) at step [34] .*rank_1\.log", 7, {1: -9}),
        ("raise@backward:5,rank=1", ENDLESS, "rank 1 raised InjectedFault: injected at backward at step 4", 7, {}),
        ("memory@forward:5,rank=0", ENDLESS, r"training, step 5: out of memory", 3, {}),
        pytest.param(
            "stop@backward:5,rank=1", STALLS, r"rank 1 has been silent for \d s, last seen at step [0-4] in", 7, {0: 7},
            marks=pytest.mark.slow,
        ),
        ("sleep=60@forward:5,rank=1", STALLS,
         r"rank 1 has not moved for \d s while others wait for it: at step 4 in data \(faults", 7, {}),
    ],
    ids=["killed", "raises", "out of memory", "stopped", "hangs"],
)  # fmt: skip
def test_a_rank_that_fails_is_named_and_no_other_stays(
    make_job: Jobs, fault: str, override: str, message: str, exit_code: int, codes: dict[int, int]
) -> None:
    job = make_job(override)
    trained = train(job, fault=fault)
    assert trained.error is not None and re.match(message, str(trained.error)), trained.error
    assert trained.error.exit_code == exit_code and trained.seconds < 15
    assert {rank: trained.codes[rank] for rank in codes} == codes
    assert folder_of(job).status() == "failed"
    if fault.startswith("raise"):  # the cause is reported once
        assert ["Traceback" in log_of(job, name) for name in ("run.log", "rank_1.log")] == [False, True]
        assert log_of(job, "error.log").count("InjectedFault: injected") == 1
    if fault.startswith("memory"):
        assert trained.error.hint == "--set training.micro_batch_sequences=4"


@pytest.mark.slow
def test_a_stopped_first_rank_is_named_where_it_hosts_the_store(make_job: Jobs) -> None:
    """As clusters start ranks: with it the store is silent, too."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    environment = {"TORCHELASTIC_USE_AGENT_STORE": "", "MASTER_PORT": str(port)}
    trained = train(make_job(STALLS), fault="stop@backward:5,rank=0", environment=environment)
    assert re.match(r"rank 0 has been silent for \d s, last seen at step [0-4] in \w+", str(trained.error))
    assert trained.codes[1] == 7


@pytest.mark.parametrize("how", ["a signal to a rank", pytest.param("cancelled", marks=pytest.mark.slow)])
def test_a_run_that_is_stopped_saves_at_one_step_and_goes_on_to_the_same_bits(
    make_job: Jobs, undisturbed: Job, how: str
) -> None:
    job = make_job()
    if how == "cancelled":  # the pause gives a moment in which to do so
        stopped = train(job, fault="sleep=0.2@step:6", cancel_when=lambda _: len(folder_of(job).rows()) > 4)
        assert stopped.error is None and stopped.ending == "preempted"
    else:
        stopped = train(job, fault="signal=TERM@backward:6,rank=1")
        assert isinstance(stopped.error, Preempted)
    assert stopped.codes == [75, 75]
    assert folder_of(job).status() == "partial" and folder_of(job).failure() is None
    assert int(newest(job).name[-6:]) == folder_of(job).rows()[-1]["step"] < STEPS
    assert train(job).ending == "done"  # both read the checkpoint, whole and of one step, or would be refused
    assert outcome(job) == outcome(undisturbed)


@pytest.mark.slow
def test_four_ranks_go_on_to_the_same_bits(make_job: Jobs) -> None:
    """More than two add in an order that depends on how DDP has laid out its buckets."""
    whole, job = make_job(), make_job()
    assert train(whole, count=4).ending == "done"
    assert isinstance(train(job, count=4, fault="signal=TERM@backward:6,rank=1").error, Preempted)
    assert train(job, count=4).ending == "done"
    assert outcome(job) == outcome(whole)


@pytest.mark.parametrize("cancelled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_stop_signal_to_the_starter_reaches_all(
    make_job: Jobs, capfd: pytest.CaptureFixture[str], cancelled: bool
) -> None:
    """Also where the run was cancelled already."""
    job, sent = make_job(ENDLESS), list[None]()

    def stop(ranks: Ranks) -> None:
        if len(folder_of(job).rows()) > 3 and not sent:
            sent.append(os.kill(os.getpid(), signal.SIGUSR1))

    trained = train(job, on_tick=stop, cancel_when=lambda _: sent and cancelled)
    assert isinstance(trained.error, Preempted) and trained.codes == [75, 75]
    assert cancelled or "stopping" in capfd.readouterr().err


def test_a_run_that_is_cancelled_before_its_ranks_listen_has_not_failed(make_job: Jobs) -> None:
    job = make_job(ENDLESS)
    trained = train(job, cancel_when=lambda ranks: True)
    assert trained.error is None and trained.ending == "preempted" and folder_of(job).failure() is None


@pytest.mark.parametrize("after", [0, 1])
def test_a_rank_that_was_stopped_before_it_joined_is_not_waited_for(
    make_job: Jobs, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpt2lab.executors.ranks.GRACE_SECONDS", 0.3)
    job = make_job(ENDLESS)

    def start(job: Job, given: Mapping[str, str], log: IO[str]) -> Any:
        stopped = ["sh", "-c", f"sleep {after}; exit {Preempted.exit_code}"]
        return subprocess.Popen(stopped) if given["RANK"] == "1" else ForkedRank(job, given, log)

    began = time.monotonic()
    assert Scheduler(RanksExecutor(2, start), lambda: None).run([job]) == {job.run_id: "preempted"}
    assert time.monotonic() - began < SECONDS / 2 and folder_of(job).failure() is None


def test_cancelling_a_run_whose_ranks_are_done_changes_nothing(make_job: Jobs, undisturbed: Job) -> None:
    job = make_job()
    trained = train(job, cancel_when=lambda ranks: all(rank.poll() is not None for rank in ranks))
    assert trained.ending == "done" and outcome(job) == outcome(undisturbed)


def test_another_number_of_ranks_goes_on_with_the_same_batches_and_says_so(make_job: Jobs, undisturbed: Job) -> None:
    job = make_job()
    assert isinstance(train(job, fault="signal=TERM@step:6").error, Preempted)
    assert train(job, count=4).ending == "done"
    assert "saved by 2 ranks, continued by 4" in log_of(job)
    torch.testing.assert_close(final(job)[0], final(undisturbed)[0], rtol=0, atol=1e-5)


def test_ranks_that_differ_are_refused_and_the_key_is_named(make_job: Jobs) -> None:
    job = make_job()
    other = replace(job, config=make_job("optim.lr=0.02").config, identity={**job.identity, "core": "b" * 64})
    trained = train(job, jobs={"1": other})
    assert trained.error is not None and trained.error.exit_code == 2 and trained.codes == [2, 2]
    assert "optim.lr: differs between ranks; rank 0: 0.01; rank 1: 0.02" in str(trained.error)
    assert f"core: differs between ranks; rank 0: {job.identity['core']}; rank 1: {'b' * 64}" in str(trained.error)
    assert not folder_of(job).metrics.exists()
    assert sum(log_of(job, name).count("error [CONFIG] optim.lr") for name in ("run.log", "rank_1.log")) == 1


def test_ranks_that_load_other_checkpoints_are_refused(make_job: Jobs, tmp_path: Path) -> None:
    job = make_job()
    assert isinstance(train(job, fault="signal=TERM@step:6").error, Preempted)
    trained = train(job, jobs={"1": replace(job, root=str(tmp_path / "elsewhere"))})
    message = r"checkpoint: differs between ranks; rank 0: step \d, [0-9a-f]{12}; rank 1: none"
    assert re.search(message, str(trained.error))


def test_a_run_that_is_finished_or_locked_is_left_alone(make_job: Jobs, undisturbed: Job) -> None:
    before = folder_of(undisturbed).metrics.stat().st_mtime_ns
    assert train(undisturbed).ending == "found"
    assert folder_of(undisturbed).metrics.stat().st_mtime_ns == before
    job = make_job()
    job.write()
    executor = RanksExecutor(2, ForkedRank)
    with folder_of(job).lock():
        executor.submit(job)
        wait_until(lambda: executor.poll(1))
        assert executor.collect(job.run_id) == "locked"
    executor.close()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ranks_end_when_their_starter_is_killed(make_job: Jobs, tmp_path: Path) -> None:
    job, note = make_job(ENDLESS), tmp_path / "pids"
    starter = os.fork()
    if starter == 0:
        train(job, on_tick=lambda ranks: note.write_text(" ".join(str(rank.pid) for rank in ranks)))
        os._exit(0)
    wait_until(lambda: len(folder_of(job).rows()) > 3)
    pids = [int(word) for word in note.read_text().split()]
    assert len(pids) == 2 and all(map(is_alive, pids))
    os.kill(starter, signal.SIGKILL)
    os.waitpid(starter, 0)
    # threads may outlive the first for a moment
    wait_until(lambda: not any(map(is_alive, pids)) and folder_of(job).status() != "running", 10)
    assert folder_of(job).status() == "partial" and folder_of(job).failure() is None
    assert re.search(r"stopped after step \d+ \(\w[\w ]+\), all saved", log_of(job))
