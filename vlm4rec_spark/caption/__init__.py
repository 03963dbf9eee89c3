"""The caption stage: which photos (plan), the UDF around the model (worker)."""
