"""``helios models push``: a revision to an OCI registry, from the registry itself."""

from rich.console import Console

from helios.cli.edge import open_admin
from helios.cli.state import StateDirectory
from helios.cli.transfer_progress import ProgressBar, ProgressLines, size
from helios.registry.client import IngestProgress, PushClient, PushDone


async def models_push(
    state: StateDirectory, console: Console, model: str, target: str, *, is_json: bool = False
) -> None:
    """Pushes a revision; shows how far it is. Ctrl-C ends it, and the same command goes on where it was."""
    async with open_admin(state) as dialer:
        with PushLines(console) if is_json else PushBar(console) as shown:
            async for event in PushClient(dialer).push(model, target):
                if isinstance(event, IngestProgress):
                    shown.progress(event)
                else:
                    shown.done(model, event)


class PushBar(ProgressBar):
    """A push's progress for people."""

    def __init__(self, console: Console) -> None:
        super().__init__(console, phase="look")

    def done(self, model: str, event: PushDone) -> None:
        """Says where it is now."""
        self.say(f"{model} is {event.location}, {size(event.sent_bytes)} sent, {size(event.known_bytes)} were there")


class PushLines(ProgressLines):
    """A push's progress for programs; the last line is ``done``."""

    def done(self, model: str, event: PushDone) -> None:
        """Writes where it is now."""
        self.write(
            {
                "done": {
                    "model": model,
                    "revision": event.revision,
                    "location": event.location,
                    "sent_bytes": event.sent_bytes,
                    "known_bytes": event.known_bytes,
                }
            }
        )
