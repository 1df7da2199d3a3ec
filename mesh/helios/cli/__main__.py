"""``python -m helios.cli``: the command ``helios``."""

from helios.cli.main import app

app()
