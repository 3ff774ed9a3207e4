"""The process of a study that was granted hours: the command `run` with an end. Asks itself to save and stop before its
hours are over, and ends itself when they are.

    python -m gpt2lab.cli.granted RUNS CAMPAIGN GRANT SECONDS STARTED COMMAND...
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time


def main(arguments: list[str]) -> None:
    """Run the command, and return what it has not used of its grant."""
    runs, campaign, grant, seconds, started, *words = arguments
    allowed, began = float(seconds), time.monotonic() - max(0.0, time.time() - float(started))
    threading.Thread(target=end, args=(began, allowed), name="gpt2lab-deadline", daemon=True).start()

    from gpt2lab.cli import main as command
    from gpt2lab.experiments.budget import Budget
    from gpt2lab.store import Store

    code = 1
    try:
        sys.argv = ["gpt2lab", *words]
        command()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    finally:
        budget = Budget(Store(runs), campaign, hours=0, hypotheses=0)  # limits are of no matter for what is returned
        budget.settle(grant, time.monotonic() - began, code)
    sys.exit(code)


def end(began: float, allowed: float) -> None:
    """Stop this process: first so that it saves, then at once. Its workers end with it."""
    from gpt2lab.experiments.budget import before_the_end

    for seconds, number in ((before_the_end(allowed), signal.SIGTERM), (allowed, signal.SIGKILL)):
        time.sleep(max(0.0, began + seconds - time.monotonic()))
        os.kill(os.getpid(), number)


if __name__ == "__main__":
    main(sys.argv[1:])
