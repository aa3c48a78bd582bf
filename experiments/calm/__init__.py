"""Training and evaluation of next-vector models (CALM)."""
