"""What a run shows while it goes: a progress bar and a line a case with rich, or the lines alone without it."""

from __future__ import annotations

import sys
import time
from typing import Any

EXTRA = "pip install 'tconv[bench]'"


class Refused(Exception):
    """What was asked cannot be done; the message says why and what would do.  Shown without a traceback."""


def console() -> Any:
    """rich's console, wide enough for any table where there is no terminal.  Raises Refused where rich is not installed."""
    try:
        from rich.console import Console
    except ImportError as error:
        raise Refused(f"tables and progress are drawn by rich, which is not installed: {EXTRA}, or --plain") from error
    return Console(width=None if sys.stdout.isatty() else 300, highlight=False)


class Rich:
    """A bar with the case at hand, the count, the time so far and the time left; lines scroll above it."""

    def __init__(self) -> None:
        self.console = console()
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        self.bar = Progress(*columns, TimeRemainingColumn(), console=self.console, transient=True)
        self.task: Any = None

    def __enter__(self):
        self.bar.start()
        return self

    def __exit__(self, *_):
        self.bar.stop()

    def start(self, total: int, done: int) -> None:
        if self.task is not None:  # of the step before
            self.bar.remove_task(self.task)
        self.task = self.bar.add_task("", total=total, completed=done)

    def at(self, what: str, done: int | None = None) -> None:
        if self.task is not None:
            self.bar.update(self.task, description=what[:60], completed=done)

    def line(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)


class Plain:
    """Lines with the time so far, for logs and where rich is not installed."""

    def __init__(self) -> None:
        self.begin, self.total, self.done = time.time(), 0, 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def start(self, total: int, done: int) -> None:
        self.total, self.done = total, done

    def at(self, what: str, done: int | None = None) -> None:
        self.done = self.done if done is None else done

    def line(self, text: str) -> None:
        print(f"[{time.time() - self.begin:5.0f} s, {self.done}/{self.total}] {text}", flush=True)


def table(title: str, columns: list[str], rows: list[list[str]], plain: bool = False) -> None:
    """Print a table; columns after the first are right-aligned when all their cells look like numbers."""
    if plain:
        widths = [max(len(c), *(len(r[i]) for r in rows)) if rows else len(c) for i, c in enumerate(columns)]
        print(title)
        for line in (columns, *rows):
            print("  " + "  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip())
        print()
        return
    out = console()
    from rich.table import Table
    from rich.text import Text

    drawn = Table(title=title, title_justify="left", title_style="bold")
    for i, name in enumerate(columns):
        numeric = i > 0 and all(
            r[i].rstrip("x%").replace(".", "").replace("-", "").isdecimal() or not r[i] for r in rows
        )
        drawn.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(cell) for cell in row))
    out.print(drawn)
