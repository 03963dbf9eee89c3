"""VLM4Rec on Spark: from product photos and an interaction log to everybody's top-k recommendations."""

__version__ = "0.1.0"
