"""Slices that divide rows into blocks whose arrays fit in memory or in the cores' caches."""

from collections.abc import Iterator


def blocks(rows: int, limit: int, per_row: int = 1) -> Iterator[slice]:
    """Slices over `rows`. Each has at most `limit` values, at `per_row` values a row."""
    size = max(1, limit // max(1, per_row))
    for start in range(0, rows, size):
        yield slice(start, start + size)
