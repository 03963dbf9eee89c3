"""Makes a small captioner out of labelled photos.

`vlm4rec train-captioner`. Numpy and torch; no Spark.
"""
