"""A file that must be the one that was listed.

A place without hashes names a file's state by an ETag. What comes with another one is a file of another time: beside
files that were read before it would make a model that never was, remembered as what the listing stands for.
"""

from dataclasses import dataclass

from helios.mesh.transfer.source import RangeSource, Sink, SourceState
from helios.registry.sources.remote import RemoteFile, changed


@dataclass(frozen=True, slots=True)
class PinnedSource:
    """A source of bytes that refuses other states than the listed one; ``RangeSource``."""

    source: RangeSource
    file: RemoteFile

    def describe(self) -> SourceState:
        """Says what is there. Raises Conflict: SOURCE_CHANGED, it is not what was listed."""
        state = self.source.describe()
        check_state(self.file, state.etag)
        return state

    def read(self, state: SourceState, offset: int, length: int, sink: Sink) -> None:
        """Hands bytes on."""
        self.source.read(state, offset, length, sink)

    def close(self) -> None:
        """Lets go of connections."""
        self.source.close()


def check_state(file: RemoteFile, etag: str) -> None:
    """Raises Conflict: SOURCE_CHANGED, where a file comes with another ETag than it was listed with."""
    # Azure's listings leave the quotes out that its headers have.
    if file.state and etag and etag.strip('"') != file.state.strip('"'):
        raise changed(file.path)
