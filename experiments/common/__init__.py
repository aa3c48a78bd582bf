"""Shared by the programs: flags and runs, models, answers, plots, tables."""
