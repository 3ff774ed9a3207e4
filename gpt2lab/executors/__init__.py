"""Where runs execute. An executor takes jobs and says how each ended; it knows nothing of ablations."""
