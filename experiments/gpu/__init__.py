"""Checks of a GPU: attention, sweeps, generation, training, benchmarks."""
