"""Several registries on one database: one of them brings the storage agents together, the others pass on to it.

    standing   whom a session belongs to, as one registry sees it: pure
    seats      who the coordinator is, by a lease in the database
    relay      sessions and calls on their way to it

What agents hold and claim is soft state that changes with every chunk, so it stays in one process's memory, and what
the database says is whose. Agents know nothing of that: they dial any registry.
"""
