"""Training, generation and tokenizing measured beside others, both sides in turns. For a checkout; not installed."""
