"""Databases for tests, of both kinds, empty or up to date."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from shutil import copyfile

from helios.registry.database import Database
from tests.registry.postgresql import Server

Place = Path | str
_TEMPLATE = "up_to_date"


@asynccontextmanager
async def opened(place: Place) -> AsyncIterator[Database]:
    """Opens a database for the length of the block."""
    database = await Database.open(place)
    try:
        yield database
    finally:
        await database.close()


@dataclass(frozen=True)
class Templates:
    """A database of each kind that is up to date and empty, to be copied: faster than all steps for each test."""

    file: Path
    server: Server

    @classmethod
    def make(cls, directory: Path, server: Server) -> "Templates":
        """Makes both."""
        url = server.make_database(_TEMPLATE)

        async def open_both() -> None:
            for place in (directory / "template.db", url):
                async with opened(place):
                    pass

        asyncio.run(open_both())
        return cls(directory / "template.db", server)

    @contextmanager
    def place(self, kind: str, directory: Path, *, is_empty: bool) -> Iterator[Place]:
        """Yields a new database of a kind, empty or up to date; one of the server is dropped after the block."""
        if kind == "sqlite":
            path = directory / "registry.db"
            if not is_empty:
                copyfile(self.file, path)
            yield path
            return
        name = f"test_{secrets.token_hex(6)}"
        url = self.server.make_database(name, template="template0" if is_empty else _TEMPLATE)
        try:
            yield url
        finally:
            self.server.drop_database(name)
