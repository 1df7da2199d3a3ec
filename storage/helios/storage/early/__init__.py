"""Loading a revision before all of it is here: what the agent tells of growing files, and the holder's side of that.

Invariants: nothing is told to be here that no BLAKE3 of the registry's index, or a sha256, vouches for; nothing that
was read counts before the revision is lent, whose sha256s were compared, from the very files that were read.
"""
