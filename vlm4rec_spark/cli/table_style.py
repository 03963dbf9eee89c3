"""The look of the command line's tables."""

from collections.abc import Iterable

from rich import box
from rich.table import Table


def new_table(
    title: str,
    texts: Iterable[str],
    figures: Iterable[str],
) -> Table:
    """An empty table with columns of text on the left, and of figures on the right."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, collapse_padding=True)
    for name in texts:
        table.add_column(name)
    for name in figures:
        table.add_column(name, justify="right")
    return table
