"""Loading a revision before all of it is here: which parts of its files are verified, and tensors as they become so.

Invariants: nothing is read that no BLAKE3 of the registry's index vouches for; nothing that was read counts before the
whole's sha256 was compared and the revision is lent, from the very files that were read.
"""
