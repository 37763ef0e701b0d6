"""Tables on the terminal, by rich: as wide as the terminal, plain text when piped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

PIPED_WIDTH = 160
"""Columns when the output is no terminal: wide enough that nothing that somebody greps for is folded."""


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], numbers: bool = False) -> None:
    """One table; with `numbers` every column but the first is aligned right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        console = Console(width=PIPED_WIDTH)
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if numbers and index else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)
