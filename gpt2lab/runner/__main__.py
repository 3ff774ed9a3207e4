"""`python -m gpt2lab.runner`: a worker process."""

import sys

from gpt2lab.runner.main import main

if __name__ == "__main__":
    sys.exit(main())
