"""How far an ingest or a push is: a bar for people, lines of JSON for programs."""

import json
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from helios.registry.client import IngestProgress


class ProgressBar:
    """Progress for people: the rate and the time left are the registry's own. A context manager."""

    def __init__(self, console: Console, *, phase: str) -> None:
        """Takes the name of the phase that goes on until the first news."""
        self._console = console
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            _Rate(),
            _Remaining(),
            console=console,
            transient=True,
        )
        self._task = self._bar.add_task(phase, total=None, rate=0.0, remaining=None)

    def __enter__(self) -> Self:
        """Shows the bar."""
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Takes it away."""
        self._bar.stop()

    def progress(self, event: IngestProgress) -> None:
        """Shows news."""
        self._bar.update(
            self._task,
            description=event.phase,
            completed=event.done_bytes,
            total=event.total_bytes or None,
            rate=event.bytes_per_second,
            remaining=event.remaining_seconds,
        )

    def refresh(self) -> None:
        """Draws the bar now."""
        self._bar.refresh()

    def say(self, text: str) -> None:
        """Prints a line that stays."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class ProgressLines:
    """Progress for programs: a JSON object a line. A context manager, as the bar is."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def __enter__(self) -> Self:
        """Does nothing."""
        return self

    def __exit__(self, *_: object) -> None:
        """Does nothing."""

    def progress(self, event: IngestProgress) -> None:
        """Writes news."""
        self.write(
            {
                "phase": event.phase,
                "done_bytes": event.done_bytes,
                "total_bytes": event.total_bytes,
                "bytes_per_second": round(event.bytes_per_second),
                "remaining_seconds": None if event.remaining_seconds is None else round(event.remaining_seconds, 1),
            }
        )

    def write(self, document: dict[str, object]) -> None:
        """Writes a line."""
        self._console.file.write(json.dumps(document) + "\n")
        self._console.file.flush()


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        rate: float = task.fields["rate"]
        return Text(f"{size(rate)}/s" if rate else "", style="progress.data.speed")


class _Remaining(ProgressColumn):
    def render(self, task: Task) -> Text:
        seconds: float | None = task.fields["remaining"]
        if seconds is None:
            return Text("")
        return Text(_clock(seconds), style="progress.remaining")


def fetch_text(done_bytes: int, total_bytes: int, bytes_per_second: float, remaining_seconds: float | None) -> str:
    """How far a fetch is, in a few words; without a time left it says that nothing comes."""
    share = f"{done_bytes / max(1, total_bytes):.0%}"
    if remaining_seconds is None:
        return f"{share}, standing still"
    return f"{share} at {size(bytes_per_second)}/s, {_clock(remaining_seconds)} left"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def size(count: float) -> str:
    """Returns bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
