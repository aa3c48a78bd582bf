"""Training and evaluation of density models."""
