"""A model looked at from outside: its parameters and FLOPs, one forward pass with its shapes, and with its values."""
