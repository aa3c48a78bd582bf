"""Analysis of a model in its durations: sweeps, attribution, search, pruning."""
