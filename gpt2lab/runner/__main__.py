"""`python -m gpt2lab.runner RUN_FOLDER/job.json`: a worker process."""

import sys

from gpt2lab.runner.worker import main

if __name__ == "__main__":
    sys.exit(main())
