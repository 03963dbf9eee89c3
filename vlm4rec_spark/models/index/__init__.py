"""The index and its companion folders: files that any Python process can open and search."""
