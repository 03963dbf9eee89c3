"""Texts and photos to unit vectors."""
