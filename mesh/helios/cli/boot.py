"""How the start of a mesh is shown: a live list on a terminal, plain lines elsewhere."""

from typing import Self

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from helios.cli.up import Progress


class BootDisplay:
    """Shows each step of a start while it is open; after ``close`` nothing is drawn over what is printed."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._tasks: dict[str, TaskID] = {}
        self._said: dict[str, str] = {}
        self._bars: Bars | None = None
        if console.is_terminal:
            self._bars = Bars(
                SpinnerColumn(finished_text="[green]✓[/]"),
                TextColumn("{task.description:<14}"),
                TextColumn("{task.fields[detail]}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[size]}"),
                TimeElapsedColumn(),
                console=console,
            )

    def __enter__(self) -> Self:
        """Starts drawing."""
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stops drawing."""
        self.close()

    def close(self) -> None:
        """Stops drawing and leaves what was drawn on the screen."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def show(self, progress: Progress) -> None:
        """Takes a step in."""
        if self._bars is not None:
            self._draw(self._bars, progress)
        elif self._said.get(progress.step) != (line := f"{progress.state} {progress.detail}"):
            self._said[progress.step] = line
            self._console.print(f"{progress.step}: {line}", markup=False, highlight=False)

    def _draw(self, bars: Bars, progress: Progress) -> None:
        if progress.step not in self._tasks:
            self._tasks[progress.step] = bars.add_task(progress.step, total=None, detail="", size="")
        task = self._tasks[progress.step]
        if progress.state == "done":
            total = progress.total_bytes or 1
            bars.update(task, detail=progress.detail, size="", completed=total, total=total)
        else:
            done, total_bytes = progress.done_bytes, progress.total_bytes or None
            size = f"{decimal(done)} of {decimal(total_bytes)}" if total_bytes else ""
            bars.update(task, detail=progress.detail, size=size, completed=done, total=total_bytes)
