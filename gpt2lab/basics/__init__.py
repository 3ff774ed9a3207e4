"""What every part needs and none of it knows of models: text, output, progress, signals, cores, secrets, faults."""
