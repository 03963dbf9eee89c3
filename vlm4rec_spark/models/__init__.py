"""The numpy world: images, text, vectors and searchers. Never imports Spark."""
