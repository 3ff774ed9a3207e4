"""Several ranks for one run: they train as one process does, agree on when to stop, and end together when one is lost.

Ranks are forked from this process, which has torch imported already; those behind `slow` are started as users do.
"""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import pytest
import torch
import torch._dynamo  # by which optimizers and DDP come late: ranks are forked after it
from safetensors.torch import load_file

from gpt2lab import faults
from gpt2lab.config import load_config
from gpt2lab.data.shards import prepare
from gpt2lab.errors import Gpt2labError, Preempted
from gpt2lab.evaluation import Task, complete, task, written
from gpt2lab.evaluation.tasks.asking import GREEDY, PERPLEXITY
from gpt2lab.executors.ranks import RanksExecutor
from gpt2lab.executors.scheduler import Scheduler
from gpt2lab.experiments.single import error_of
from gpt2lab.planning.arms import Arm
from gpt2lab.planning.machine import Machine
from gpt2lab.planning.runs import make_run
from gpt2lab.runner import Job, StopRequest, work
from gpt2lab.store import RunFolder, Store

TINY = """
model: {{n_layer: 2, n_head: 2, n_embd: 16, block_size: 16, vocab_size: 256}}
data: {{corpus: {{name: text, paths: ["{text}"]}}, tokenizer: bytes, validation_fraction: 0.2}}
optim: {{lr: 1e-2, warmup_steps: 4}}
training: {{steps: {steps}, batch_tokens: 256, threads: 1, checkpoint_every_steps: 4, device: cpu}}
evaluation: {{every_steps: 6, tokens: 256}}
"""
STEPS = 12
PREEMPTED = Preempted.exit_code
SECONDS = 60.0  # after which a test gives up


@pytest.fixture(scope="module")
def preset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A preset over some 9,000 bytes of words."""
    folder = tmp_path_factory.mktemp("preset")
    dice = random.Random(0)
    words = ["speak", "noble", "queen", "and", "the", "of", "night", "to", "sword", "love"]
    (folder / "text.txt").write_text(" ".join(dice.choice(words) for _ in range(2000)))
    (folder / "tiny.yaml").write_text(TINY.format(text=folder / "text.txt", steps=STEPS))
    return folder / "tiny.yaml"


Jobs = Callable[..., Job]


@pytest.fixture(scope="module")
def make_job(preset: Path, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """Makes the job of a run, in a store of its own."""
    home = tmp_path_factory.mktemp("data")

    def make(*overrides: str, root: str = "runs") -> Job:
        config = load_config(preset, overrides)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("GPT2LAB_DATA", str(home))
            data = prepare(config.data)
        run = make_run(Arm("tiny", {}, config), 0, data, Machine("cpu", "cpu", 1, 1, 1e9, "a test"))
        store = tmp_path_factory.mktemp(root)
        return Job(str(store), run.id, run.config.to_yaml(), run.identity, str(data.path), 1e6, 1)

    return make


class Forked:
    """A rank's process, forked: what `python -m gpt2lab.runner` does once its imports are done."""

    def __init__(self, job: Job, environment: Mapping[str, str], log: IO[str], fault: str) -> None:
        self.code: int | None = None
        self.pid = os.fork()
        if self.pid:
            return
        code = 99
        try:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
            os.environ.update(environment)
            faults.arm(fault)
            stop = StopRequest()
            stop.listen()
            code = work(job, stop)
        finally:
            os._exit(code)

    def poll(self) -> int | None:
        if self.code is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if done else None
        return self.code

    def wait(self) -> int:
        while self.poll() is None:
            time.sleep(0.01)
        assert self.code is not None
        return self.code

    def send_signal(self, sig: int, /) -> None:
        if self.poll() is None:
            os.kill(self.pid, sig)


@dataclass
class Trained:
    """What became of a run: how it ended or what was raised, after how many seconds, and the exit code of each rank, as
    far as it ended by itself."""

    ending: str
    error: Gpt2labError | None
    seconds: float
    codes: list[int | None]
    pids: list[int]


def train(job: Job, count: int = 2, fault: str = "", jobs: Mapping[str, Job] | None = None,
          then: Callable[[list[Forked]], None] | None = None,
          end_when: Callable[[list[Forked]], bool] = lambda ranks: False,
          environment: Mapping[str, str] | None = None) -> Trained:  # fmt: skip
    """Train with forked ranks. jobs: those of some ranks. then: called several times a second. end_when: whether the
    run is to be ended by now. environment: over that which the executor gives them."""
    started: list[Forked] = []

    def start(job: Job, given: Mapping[str, str], log: IO[str]) -> Forked:
        own = (jobs or {}).get(given["RANK"], job)
        started.append(Forked(own, {**given, **(environment or {})}, log, fault))
        return started[-1]

    end = time.monotonic() + SECONDS

    def tick() -> None:
        assert time.monotonic() < end, "the ranks did not end in time"
        if then:
            then(started)
        if end_when(started):
            cancelled.add(job.run_id)
            scheduler.cancel(job.run_id)

    cancelled = set[str]()
    executor = RanksExecutor(count, start)
    scheduler = Scheduler(executor, tick)
    began, ending, error = time.monotonic(), "", None
    try:
        ending = scheduler.run([job])[job.run_id]
        if ending == "preempted" and job.run_id not in cancelled:
            error = Preempted("stopped by a signal to a rank")
        if ending == "failed":
            error = error_of(folder(job).failure() or {}, folder(job))
    except Gpt2labError as raised:
        error = raised
    seconds = time.monotonic() - began
    for process in started:
        with pytest.raises(ProcessLookupError):  # no orphans
            os.kill(process.pid, 0)
    return Trained(ending, error, seconds, [rank.code for rank in executor._ranks], [p.pid for p in started])


def folder(job: Job) -> RunFolder:
    return Store(job.root).run(job.run_id)


def rows(job: Job) -> list[Any]:
    """The journal without times."""
    return [{key: value for key, value in row.items() if key != "seconds"} for row in folder(job).rows()]


def final(job: Job) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of all steps, and the weights after them."""
    newest = max(folder(job).checkpoints.iterdir())
    losses = [row["metrics"]["train/loss"] for row in rows(job) if "train/loss" in row["metrics"]]
    return losses, load_file(newest / "model.safetensors")


def bytes_of(job: Job) -> dict[str, bytes]:
    """The newest checkpoint's tensors."""
    newest = max(folder(job).checkpoints.iterdir())
    return {file.name: file.read_bytes() for file in newest.glob("*.safetensors")}


@pytest.fixture(scope="module")
def undisturbed(make_job: Jobs) -> Job:
    """A run that two ranks trained from start to end."""
    job = make_job(root="undisturbed")
    assert train(job).ending == "done"
    return job


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(["training.micro_batch_sequences=2"], id="accumulation 4"),
        pytest.param(["model.mlp={name: moe, experts: 8}"], id="experts"),
    ],
)
def test_two_ranks_train_as_one_process_does(make_job: Jobs, overrides: list[str]) -> None:
    overrides = [*overrides, "optim.optimizer={name: adamw, eps: 1e-3}"]  # less amplifies rounding of tiny gradients
    alone, together = make_job(*overrides, root="alone"), make_job(*overrides, root="together")
    assert alone.run_id == together.run_id
    assert work(alone, StopRequest()) == 0
    assert train(together).ending == "done"
    (losses, weights), (others, theirs) = final(alone), final(together)
    assert len(losses) == STEPS
    torch.testing.assert_close(others, losses, rtol=0, atol=1e-5)
    for name, value in weights.items():
        torch.testing.assert_close(theirs[name], value, rtol=0, atol=1e-5, msg=name)
    result = folder(together).result()
    assert result is not None
    assert result["stack"]["ranks"] == 2
    assert [row["step"] for row in rows(together)] == list(range(STEPS + 1))


def test_two_ranks_answer_the_questions_of_tasks_together(make_job: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["speak", "noble", "queen", "and", "the", "of", "night", "to", "sword", "love"] * 60

    def own() -> Task:
        """How does it go on?"""
        rows = [{"word": word, "number": number} for number, word in enumerate(words)]
        ask = lambda row: complete(f"{row['number']} and", f" {row['word']}")  # noqa: E731
        return Task(protocol="a test", documents=lambda: written(rows), ask=ask, measures=(GREEDY, PERPLEXITY))

    monkeypatch.setattr(task, "_components", dict(task._components))
    task.register("own", source="a test")(own)
    asked = ["evaluation.tasks=[own]", "evaluation.task_documents=600"]  # three batches
    alone, together = make_job(*asked, root="alone"), make_job(*asked, root="together")
    assert work(alone, StopRequest()) == 0
    assert train(together).ending == "done"
    found, others = (
        {row["step"]: row["metrics"]["task/own/perplexity"] for row in rows(job) if "val/loss" in row["metrics"]}
        for job in (alone, together)
    )
    assert len(found) > 3 and found[0] == others[0]
    assert others == pytest.approx(found, rel=1e-4)


def test_a_killed_rank_is_named_and_no_other_stays(make_job: Jobs) -> None:
    job = make_job("training.steps=5000")
    found = train(job, fault="kill@backward:5,rank=1")
    assert found.error is not None
    assert re.match(r"rank 1 died \(SIGKILL\) at step [34] ", str(found.error))
    assert "rank_1.log" in str(found.error)
    assert found.error.exit_code == 7
    assert found.seconds < 10
    assert folder(job).status() == "failed"
    assert found.codes[1] == -signal.SIGKILL


def test_what_a_rank_raises_is_told_once(make_job: Jobs) -> None:
    job = make_job()
    found = train(job, fault="raise@backward:5,rank=1")
    assert str(found.error).startswith("rank 1 raised InjectedFault: injected at backward at step 4")
    assert found.error is not None
    assert found.error.exit_code == 7
    logs = [(folder(job).path / name).read_text() for name in ("run.log", "rank_1.log")]
    assert ["Traceback" in log for log in logs] == [False, True]
    assert (folder(job).path / "error.log").read_text().count("InjectedFault: injected") == 1


def test_one_of_our_errors_keeps_its_exit_code(make_job: Jobs) -> None:
    found = train(make_job(), fault="memory@forward:5,rank=0")
    assert found.error is not None
    assert (found.error.exit_code, found.error.code) == (3, "ENVIRONMENT")
    assert "out of memory" in str(found.error)
    assert found.error.hint == "--set training.micro_batch_sequences=4"


def test_a_stopped_rank_is_named(make_job: Jobs) -> None:
    found = train(make_job("training.rank_timeout_seconds=1"), fault="stop@backward:5,rank=1")
    assert re.fullmatch(r"rank 1 has been silent for \d s, last seen at step [0-4] in \w+", str(found.error))
    assert found.error is not None
    assert found.error.exit_code == 7
    assert found.codes[0] == 7


def test_a_stopped_first_rank_is_named_where_it_keeps_the_store(make_job: Jobs) -> None:
    """As clusters start ranks: with it the store is silent, too."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    job = make_job("training.rank_timeout_seconds=1")
    environment = {"TORCHELASTIC_USE_AGENT_STORE": "", "MASTER_PORT": str(port)}
    found = train(job, fault="stop@backward:5,rank=0", environment=environment)
    assert re.fullmatch(r"rank 0 has been silent for \d s, last seen at step [0-4] in \w+", str(found.error))
    assert found.codes[1] == 7


def test_a_rank_that_hangs_is_named_though_its_heart_beats(make_job: Jobs) -> None:
    found = train(make_job("training.rank_timeout_seconds=1"), fault="sleep=60@forward:5,rank=1")
    assert re.match(
        r"rank 1 has not moved for \d s while others wait for it: at step 4 in data \(faults", str(found.error)
    )
    assert found.error is not None
    assert found.error.exit_code == 7


def test_a_signal_to_one_rank_stops_all_at_one_step_and_the_run_goes_on_to_the_same_bits(
    make_job: Jobs, undisturbed: Job
) -> None:
    job = make_job()
    stopped = train(job, fault="signal=TERM@backward:6,rank=1")
    assert isinstance(stopped.error, Preempted)
    assert stopped.codes == [75, 75]
    step = max(folder(job).checkpoints.iterdir()).name
    assert step in ("step_000006", "step_000007")
    assert rows(job)[-1]["step"] == int(step[-6:])
    assert train(job).ending == "done"
    assert rows(job) == rows(undisturbed)
    assert bytes_of(job) == bytes_of(undisturbed)


def test_a_stop_signal_to_the_starter_reaches_all(make_job: Jobs, capfd: pytest.CaptureFixture[str]) -> None:
    def stop(ranks: list[Forked]) -> None:
        if len(folder(job).rows()) > 3 and not sent:
            sent.append(os.kill(os.getpid(), signal.SIGUSR1))

    job, sent = make_job("training.steps=5000"), list[None]()
    found = train(job, then=stop)
    assert isinstance(found.error, Preempted)
    assert found.codes == [75, 75]
    assert "stopping" in capfd.readouterr().err


def test_a_run_that_is_ended_is_saved_by_all_ranks_at_one_step_and_can_go_on_to_the_same_bits(
    make_job: Jobs, undisturbed: Job
) -> None:
    job = make_job()
    pause = "sleep=0.2@step:6"  # so that there is a moment in which to end it
    ended = train(job, fault=pause, end_when=lambda _: len(rows(job)) > 4)
    assert ended.error is None and ended.ending == "preempted"
    assert ended.codes == [PREEMPTED, PREEMPTED]
    assert folder(job).status() == "partial" and folder(job).failure() is None
    newest = max(folder(job).checkpoints.iterdir())
    assert int(newest.name[-6:]) == rows(job)[-1]["step"] < STEPS
    assert train(job).ending == "done"  # both read the checkpoint, whole and of one step, or would be refused
    assert rows(job) == rows(undisturbed)
    assert bytes_of(job) == bytes_of(undisturbed)


def test_a_run_that_is_ended_before_its_ranks_listen_is_preempted_and_has_not_failed(make_job: Jobs) -> None:
    job = make_job("training.steps=5000")
    ended = train(job, end_when=lambda ranks: True)
    assert ended.error is None and ended.ending == "preempted"
    assert folder(job).failure() is None


def test_to_end_a_run_whose_ranks_are_done_changes_nothing(make_job: Jobs, undisturbed: Job) -> None:
    job = make_job()
    ended = train(job, end_when=lambda ranks: all(rank.poll() is not None for rank in ranks))
    assert ended.ending == "done"
    assert bytes_of(job) == bytes_of(undisturbed)


def test_who_stops_everything_is_told_so_though_the_run_was_ended_already(make_job: Jobs) -> None:
    job, sent = make_job("training.steps=5000"), list[None]()

    def stop(ranks: list[Forked]) -> None:
        if len(folder(job).rows()) > 3 and not sent:
            sent.append(os.kill(os.getpid(), signal.SIGUSR1))

    found = train(job, then=stop, end_when=lambda _: bool(sent))
    assert isinstance(found.error, Preempted)


def test_another_number_of_ranks_goes_on_with_the_same_batches_and_says_so(make_job: Jobs, undisturbed: Job) -> None:
    job = make_job()
    assert isinstance(train(job, fault="signal=TERM@step:6").error, Preempted)
    assert train(job, count=4).ending == "done"
    log = (folder(job).path / "run.log").read_text()
    assert "saved by 2 ranks, continued by 4: the same batches, but bits may differ" in log
    torch.testing.assert_close(final(job)[0], final(undisturbed)[0], rtol=0, atol=1e-5)


def test_ranks_that_differ_are_refused_and_the_key_is_named(make_job: Jobs) -> None:
    job = make_job()
    other = make_job("optim.lr=0.02")
    other = replace(job, config=other.config, identity={**other.identity, "core": "b" * 64})
    found = train(job, jobs={"1": other})
    assert found.error is not None
    assert found.codes == [2, 2]
    assert "optim.lr: differs between ranks; rank 0: 0.01; rank 1: 0.02" in str(found.error)
    assert f"core: differs between ranks; rank 0: {job.identity['core']}; rank 1: {'b' * 64}" in str(found.error)
    assert found.error.exit_code == 2
    assert not folder(job).metrics.exists()
    logs = [(folder(job).path / name).read_text() for name in ("run.log", "rank_1.log")]
    assert sum(log.count("error [CONFIG] optim.lr") for log in logs) == 1


def test_ranks_that_load_other_checkpoints_are_refused(make_job: Jobs, tmp_path: Path) -> None:
    job = make_job()
    assert isinstance(train(job, fault="signal=TERM@step:6").error, Preempted)
    elsewhere = replace(job, root=str(tmp_path / "elsewhere"))
    found = train(job, jobs={"1": elsewhere})
    what = r"checkpoint: differs between ranks; rank 0: step \d, [0-9a-f]{12}; rank 1: none"
    assert re.search(what, str(found.error))


def test_a_run_that_is_finished_is_left_alone(make_job: Jobs, undisturbed: Job) -> None:
    before = folder(undisturbed).metrics.stat().st_mtime_ns
    assert train(undisturbed).ending == "found"
    assert folder(undisturbed).metrics.stat().st_mtime_ns == before


def test_a_run_that_another_process_takes_meanwhile_is_reported_as_locked(make_job: Jobs) -> None:
    job = make_job()
    job.write()
    executor = RanksExecutor(2, lambda given, environment, log: Forked(given, environment, log, ""))
    with folder(job).lock():
        executor.submit(job)
        while not executor.poll(1):
            pass
        assert executor.collect(job.run_id) == "locked"
    executor.close()


def is_there(pid: int) -> bool:
    """Whether a process lives; one that only waits to be collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ranks_end_when_their_starter_is_killed(make_job: Jobs, tmp_path: Path) -> None:
    job = make_job("training.steps=5000")
    starter = os.fork()
    if starter == 0:
        note = tmp_path / "pids"
        train(job, then=lambda ranks: note.write_text(" ".join(str(rank.pid) for rank in ranks)) and None)
        os._exit(0)
    end = time.monotonic() + SECONDS
    while len(folder(job).rows()) < 4:
        assert time.monotonic() < end
        time.sleep(0.05)
    pids = [int(word) for word in (tmp_path / "pids").read_text().split()]
    assert all(map(is_there, pids))
    os.kill(starter, signal.SIGKILL)
    os.waitpid(starter, 0)
    killed = time.monotonic()
    while any(map(is_there, pids)) or folder(job).status() == "running":  # threads may outlive the first for a moment
        assert time.monotonic() - killed < 10
        time.sleep(0.05)
    assert folder(job).status() == "partial"
    log = (folder(job).path / "run.log").read_text()
    assert re.search(r"stopped after step \d+ \(\w[\w ]+\), all saved", log)
    assert folder(job).failure() is None
