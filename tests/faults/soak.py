"""A training that is killed every few seconds for half an hour, and must end each time as if nothing had happened.

    python -m tests.faults.soak --minutes 30

One thread; about 120 kills. The last line is a summary; the exit code is 1 when a fault was found.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from gpt2lab.runner import NOTHING_LEFT
from tests.faults.breaking import RUN, Lab, differences, outcome

COMMON: dict[str, Any] = {
    "model.n_layer": 4, "model.n_head": 4, "model.n_embd": 64, "model.block_size": 64, "training.batch_tokens": 512,
    "training.checkpoint_every_steps": 10, "optim.lr": 3e-3, "optim.warmup_steps": 50,
    "evaluation.every_steps": 50, "evaluation.tokens": 448, "evaluation.context_tokens": 64,
}  # fmt: skip
SETUPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {
        "training.micro_batch_sequences": 2, "training.keep_best": "true", "training.milestone_every_steps": 400,
        "training.nonfinite": "skip",
    },
}  # fmt: skip
"""Dropout is on in both, so that random numbers are compared as well."""


def steps_done(root: Path) -> int:
    """Rows of the journal, which has one for every step."""
    journal = root / RUN / "metrics.jsonl"
    return max(0, journal.read_bytes().count(b"\n") - 1) if journal.exists() else 0


def soak(lab: Lab, minutes: float, shortest: float, longest: float, steps: int, seed: int) -> Counter[str]:
    """Train undisturbed; then kill, restart and compare until the time is over; -> counts, "faults" among them."""
    dice, count = random.Random(seed), Counter[str]()
    changes = {name: COMMON | {"training.steps": steps} | setup for name, setup in SETUPS.items()}
    undisturbed: dict[str, dict[str, Any]] = {}
    for name in SETUPS:
        began = time.monotonic()
        assert lab.train(lab.folder / name, changes[name]) == [0], (lab.folder / name / "log.txt").read_text()
        undisturbed[name] = outcome(lab.folder / name)
        print(f"{name}: undisturbed in {time.monotonic() - began:.0f} s", flush=True)
    root, name, kills = lab.folder / "soaked", "plain", 0
    end = time.monotonic() + 60 * minutes
    while time.monotonic() < end:
        before = steps_done(root)
        [code] = lab.train(root, changes[name], kill_after=dice.uniform(shortest, longest))
        count["steps"] += max(0, steps_done(root) - before)
        if code == -signal.SIGKILL:
            count["kills"] += 1
            kills += 1
            continue
        unlike = differences(outcome(root), undisturbed[name])
        if code not in (0, NOTHING_LEFT) or unlike:
            count["faults"] += 1
            kept = Path(tempfile.mkdtemp(prefix="soak-fault-"), "root")
            shutil.copytree(root, kept)
            print(f"FAULT: exit code {code}, {kills} kills, {name}: {unlike[:9]}; kept in {kept}", flush=True)
        else:
            count["completions"] += 1
            print(f"{name}: equal after {kills} kills; so far {dict(count)}", flush=True)
        shutil.rmtree(root)
        kills, name = 0, dice.choice(list(SETUPS))
    return count


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--minutes", type=float, default=30.0)
    options.add_argument("--shortest", type=float, default=5.0, help="seconds until a kill, at least")
    options.add_argument("--longest", type=float, default=20.0, help="seconds until a kill, at most")
    options.add_argument("--steps", type=int, default=1200, help="of each training")
    options.add_argument("--seed", type=int, default=0)
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder, Lab(Path(folder) / "lab") as lab:
        lab.folder.mkdir(exist_ok=True)
        count = soak(lab, chosen.minutes, chosen.shortest, chosen.longest, chosen.steps, chosen.seed)
    print(
        f"soak: {chosen.minutes:g} minutes, {count['kills']} kills and restarts, {count['steps']} steps, "
        f"{count['completions']} completions equal to the undisturbed, {count['faults']} faults",
        flush=True,
    )
    return 1 if count["faults"] or not count["completions"] else 0


if __name__ == "__main__":
    sys.exit(main())
