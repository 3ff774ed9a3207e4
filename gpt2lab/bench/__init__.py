"""How fast training is: our engine beside the smallest readable GPT-2, interleaved on the same work."""
