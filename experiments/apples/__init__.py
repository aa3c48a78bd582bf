"""The bundled model apples: its prompts, training and evaluation."""
