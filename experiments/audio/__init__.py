"""Density models of sound."""
