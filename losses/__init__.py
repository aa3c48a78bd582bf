"""Losses: pure functions of arrays.

Empty so far: cross-entropy, the only one in use, is optax's.
"""
