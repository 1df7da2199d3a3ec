"""Storage agents and what brings them together: who holds which blob, and who reads what from the cloud.

    cluster   what agents said, whom that concerns, and who may read which span; pure
    outbox    what is still to be told to one agent; pure, bounded
    wire      protos to values and back
    servicer  SyncService: the sessions

All of it is soft state in memory: agents say everything again after a reconnect, and a registry that restarts knows it
all after a second. Nothing here decides about models, and no byte of one passes.
"""
