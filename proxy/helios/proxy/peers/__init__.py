"""Several proxies: one leads, all pick and hold.

    role         who leads, by the registry's lease and by what others say; pure
    messages     what two proxies tell each other
    followers    the leader's side of it: what is wanted elsewhere, what is to be told; pure
    following    a follower's side: what it wants, what it was told; pure
    escrow       the leader's limits, handed out in slices; pure
    wire         messages as protos
    servicer     PeerService: the leader's end of a session
    session      a follower's end
    lease        the registry's lease, asked for and renewed
    forward      operators' calls that are the leader's, passed on to it

May know the registry's client and its own contract. Invariants: only a proxy that leads orders anything of a worker;
what all proxies admit of a key's requests is never more than its limit; a peer that is gone costs nothing.
"""
