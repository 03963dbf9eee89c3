"""The index artifact and its companions: files that any Python process can open and search."""
