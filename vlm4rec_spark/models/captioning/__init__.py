"""Captioning without Spark: prompts, backends, the model's process, checks of its answers."""
