"""Plain text tables that paste into Markdown."""

from __future__ import annotations


class Table:
    """Rows under a header, printed with aligned columns.

    Args:
        header: column names.
    """

    def __init__(self, *header: str) -> None:
        self._rows: list[tuple[str, ...]] = [header]

    def add(self, *cells: object) -> None:
        """Append a row; as many cells as the header has."""
        self._rows.append(tuple(str(cell) for cell in cells))

    def print(self) -> None:
        """Write the table to standard output."""
        widths = [max(len(row[i]) for row in self._rows) for i in range(len(self._rows[0]))]
        for number, row in enumerate(self._rows):
            print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")
            if number == 0:
                print("|" + "|".join("-" * (width + 2) for width in widths) + "|")
