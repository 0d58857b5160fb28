"""Tables that read well in a terminal and paste into Markdown."""

from __future__ import annotations

from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table as RichTable


class Table:
    """Rows under a header.

    Args:
        header: column names.
    """

    def __init__(self, *header: str) -> None:
        self._table = RichTable(*header, box=MARKDOWN)

    def add(self, *cells: object) -> None:
        """Append a row; as many cells as the header has."""
        self._table.add_row(*map(str, cells))

    def print(self) -> None:
        """Write the table to standard output."""
        Console(width=200, soft_wrap=True).print(self._table)
