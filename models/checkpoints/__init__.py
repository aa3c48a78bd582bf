"""Hugging Face checkpoints: config fields, tensor layouts, caches, the hub."""
