"""This node among the others: what it tells the registry, and how a blob comes from many nodes at once.

    holdings   what the node holds, and what of that the registry has not been told; pure
    session    the stream with the registry: inventory, wants, claims
    policy     which chunk next, and from whom; pure
    partial    unfinished blobs that others may read from already
    source     one blob of many sources: peers, whole and partial, and the cloud
    swarms     the event loop's part of that: who has what, claims

A registry that is away costs coordination, never a fetch.
"""
