"""The page of a sweep, from its record alone: read it, say what it found, draw it, write it (`writing.py`)."""
