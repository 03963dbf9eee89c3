"""VLM4Rec on Spark: product photos and an interaction log to top-k recommendations."""

__version__ = "0.1.0"
