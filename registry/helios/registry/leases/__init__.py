"""Leases by name: one holder at a time, and a number that only grows for each grant, by which others fence.

    lease      what a lease is, and what becomes of it: pure
    store      its rows; the database's clock says when one has ended
    servicer   the contract; ``client`` is its other side, ``wire`` the values between

Nobody is told of changes: who waits for a lease asks again when what holds it ends.
"""
