"""Progress and tables on a terminal, and in logs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table as RichTable
from rich.text import Text

from fraqat.distill import StepRecord
from fraqat.printable import printable
from fraqat.table import Table


class ConsoleProgress:
    """A live line on a terminal, a line now and then elsewhere. Use it as a context: it hides the terminal's cursor meanwhile.

    Args:
        console: Of standard error.
        quiet: Show warnings alone.
        clock: Seconds.
    """

    def __init__(self, console: Console, quiet: bool = False, clock: Callable[[], float] = time.monotonic):
        self._console, self._quiet = console, quiet
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed}/{task.total}"),
        )
        self._bars = Progress(*columns, TextColumn("{task.fields[text]}"), console=self._console, transient=True)
        self._task: Any = None
        self._is_live = self._console.is_terminal and not quiet
        self._clock = clock
        self._counted = ("", 0, 0.0)
        """What is counted, where it began, and when."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._clear()

    def say(self, text: str) -> None:
        """Prints a line."""
        self._clear()
        if not self._quiet:
            self._console.print(printable(text), markup=False)

    def warn(self, text: str) -> None:
        """Prints a line that stands out, also when quiet."""
        self._clear()
        self._console.print(f"warning: {printable(text)}", style="yellow", markup=False)

    def step(self, record: StepRecord) -> None:
        """Shows stage, bits, loss, step time and time left."""
        text = (
            f"stage {record.stage + 1}/{record.num_stages}  {record.bits:g} bits  loss {record.loss:.5f}  "
            f"{record.step_ms:.0f} ms/step  {_duration(record.left_s)} left"
        )
        self._show("training", record.step + 1, record.total_steps, text, max(1, record.total_steps // 10))

    def count(self, what: str, done: int, total: int) -> None:
        """Shows a count, and the time left."""
        if self._counted[0] != what or done <= self._counted[1]:
            self._counted = (what, done, self._clock())
        _, first, start = self._counted
        left_s = (self._clock() - start) * (total - done) / (done - first) if done > first else None
        self._show(what, done, total, "" if left_s is None else f"{_duration(left_s)} left", 0)

    def _show(self, what: str, done: int, total: int, text: str, every: int) -> None:
        if self._quiet:
            return
        if not self._is_live:
            if every and done % every == 0:
                self._console.print(f"{what} {done}/{total}  {text}", markup=False)
            return
        if self._task is None:
            self._bars.start()
            self._task = self._bars.add_task(what, total=total, completed=done, text=text)
        self._bars.update(self._task, description=what, completed=done, total=total, text=text)
        if done >= total:
            self._clear()

    def _clear(self) -> None:
        if self._task is not None:
            self._bars.stop()
            self._bars.remove_task(self._task)
            self._task = None


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def print_table(console: Console, table: Table) -> None:
    """Prints a table with its notes, transposed where only that fits the terminal."""
    table = _fitted(table, console.width)
    rich_table = RichTable(
        title=Text(printable(table.title), style="bold"),
        title_justify="left",
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
    )
    for i, column in enumerate(table.columns):
        is_number = all(isinstance(row[i], int | float | None) for row in table.rows)
        rich_table.add_column(Text(printable(column, "")), justify="right" if is_number else "left", no_wrap=True)
    for cells in table.to_cells():
        rich_table.add_row(*(Text(cell) for cell in cells))
    console.print(rich_table)
    for note in table.notes:
        console.print(printable(note), style="dim", markup=False)


def _fitted(table: Table, width: int) -> Table:
    gaps = 2 * (len(table.columns) - 1)
    if sum(table.widths()) + gaps <= width or len(table.rows) >= len(table.columns):
        return table
    return table.transposed()
