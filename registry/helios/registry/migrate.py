"""Brings a database's schema to the one that this Helios knows. Runs in the transaction that it is given.

The steps are Alembic's, in ``migrations/versions``; this module decides which are due. Alembic is imported only where
one is: it costs a start a tenth of a second. There is no way back: rows of a newer schema may say what an older one
can't, so a database that is newer than the code is refused, and one from before Alembic is taken in by the number that
it kept then.
"""

from pathlib import Path
from typing import Final

from sqlalchemy import Connection, inspect, text

from helios.mesh.errors import PreconditionFailed

HEAD: Final = 13
"""The newest step; a test holds it to what ``migrations/versions`` has. A step's id is its number in four digits."""

SCRIPTS: Final = Path(__file__).parent / "migrations"


def bring_up(connection: Connection) -> None:
    """Runs the steps that a database lacks; all of them on an empty one.

    Raises:
        PreconditionFailed: SCHEMA_MISMATCH, a newer Helios wrote it.
    """
    tables = set(inspect(connection).get_table_names())
    if "alembic_version" in tables:
        found = connection.execute(text("SELECT version_num FROM alembic_version")).scalar_one()
        _refuse_newer(found)
        if int(found) < HEAD:
            _run(connection, None)
        return
    kept = None
    if "schema_version" in tables:
        kept = connection.execute(text("SELECT version FROM schema_version")).scalar_one_or_none()
        _refuse_newer(str(kept or 0))
    _run(connection, kept)


def _refuse_newer(found: str) -> None:
    if not found.isdecimal() or int(found) > HEAD:
        raise PreconditionFailed(
            f"the registry's database has schema {found}, this Helios knows {HEAD}:"
            " use the version that wrote it, or start with an empty database",
            reason="SCHEMA_MISMATCH",
        )


def _run(connection: Connection, kept: int | None) -> None:
    from alembic import command  # noqa: PLC0415 - see the module's docstring
    from alembic.config import Config  # noqa: PLC0415

    config = Config()
    # Alembic gives "%" a meaning in its options.
    config.set_main_option("script_location", str(SCRIPTS).replace("%", "%%"))
    config.attributes["connection"] = connection
    if kept is not None:
        command.stamp(config, f"{kept:04d}")
    command.upgrade(config, "head")
