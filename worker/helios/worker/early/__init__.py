"""Loads that begin while their revision is fetched: the replica is forked as soon as a start has something to do.

Invariants: nothing is read before the storage agent says that it is here and verified; a replica that read anything
early is ready only after the whole's sha256 was compared and the revision was lent, from the very files that it read,
none of which was fetched anew meanwhile. `growth` decides that and knows neither files nor tasks.
"""
