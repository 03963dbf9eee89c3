"""Captioning without Spark: prompts, backends, the process around the model, checks of its answers."""
