"""What Alembic runs: the steps, on the connection and in the transaction that ``helios.registry.migrate`` gives."""

from alembic import context

from helios.registry.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
context.run_migrations()
