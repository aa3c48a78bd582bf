"""Programs: `python -m continuous_lm.experiments.NAME --help` says what each one does."""
