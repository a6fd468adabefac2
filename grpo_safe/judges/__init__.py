"""Evaluation's judges beside the reward model, one a file: (prompt, answer) -> a verdict."""
