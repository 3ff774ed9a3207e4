"""`python -m gpt2lab`, and `torchrun -m gpt2lab`: the command line."""

from gpt2lab.cli import main

if __name__ == "__main__":
    main()
