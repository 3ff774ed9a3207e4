"""Weights in and out: GPT-2 in Hugging Face's layout and nanoGPT's checkpoints (huggingface.py), gpt2lab's layout
for any assembly (native.py), and weights that a training starts from (origin.py)."""
