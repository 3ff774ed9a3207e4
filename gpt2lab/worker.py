"""`python -m gpt2lab.worker RUN_FOLDER/job.json`: a worker process. Before torch is imported, it takes care of signals
and of the end of its parent."""

import sys

from gpt2lab.basics.signals import stop_without_loss

if __name__ == "__main__":
    stop_without_loss()
    from gpt2lab.runner import main

    sys.exit(main())
