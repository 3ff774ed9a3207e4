"""The pages of studies, sweeps and the whole store, from the run store alone: no torch, no config, no tracker."""
