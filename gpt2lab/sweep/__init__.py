"""Searches for settings: declaration.py reads a sweep's file, trials.py shares the trials of a search among workers in
an Optuna storage (storage.py), sampling.py draws their settings and prunes them, drive.py trains them.
"""
