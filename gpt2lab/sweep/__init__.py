"""Searches in progress: slots kept in an Optuna storage, drawn by samplers, stopped by pruners, worked on by any number
of processes.

storage.py opens what is shared, patience.py waits for it, slots.py gives out turns and takes results, turns.py says
what the stored trials mean, sampling.py draws parameters and decides on stopping. None of them trains.
"""
