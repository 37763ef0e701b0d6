"""A bar on the terminal while large files are read, by rich; nothing where the output is no terminal."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path


def shown_bytes(files: Sequence[Path], doing: str) -> Generator[Path, None, None]:
    """The files one after the other; the bar counts their bytes. Each must be taken, or the bar stays."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    total = sum(file.stat().st_size for file in files)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(doing, total=total)
        for file in files:
            yield file
            progress.advance(task, file.stat().st_size if file.exists() else 0)
