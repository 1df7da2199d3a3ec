"""Several proxies: one leads, all pick and hold.

    leadership   what it means to lead or to follow; pure
    role         who leads, by the registry's lease and by what others say; pure
    claims       what workers say of leaders, which may be wrong; pure
    messages     what two proxies tell each other
    followers    the leader's side of it: what is wanted elsewhere, what is to be told; pure
    following    a follower's side: what it wants, what it was told; pure
    escrow       the leader's limits, handed out in slices; pure
    wire         messages as protos
    servicer     PeerService: the leader's end of a session
    session      a follower's end
    lease        the registry's lease, asked for and renewed
    link         when something may have to be told, and who waits for it
    calls        calls of other proxies, for somebody who called this one
    forward      operators' calls that are the leader's, passed on to it
    group        all of it: one proxy's part among several

May know the registry's client and its own contract. Invariants: only a proxy that leads orders anything of a worker;
what all proxies admit of a key's requests is never more than its limit; a peer that is gone costs nothing.
"""
