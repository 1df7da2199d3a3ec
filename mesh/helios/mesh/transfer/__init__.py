"""Fetching one large blob in parallel ranges, resumably, without ever trusting the source.

Shared by the storage agent (blobs of a revision) and the registry (files of a hub), which may not import each other.

    source      RangeSource, what bytes come from; adapters: objects (obstore), http (proxies: of the environment)
    machine     which chunk next, what is retried when, how far the bytes are contiguous; pure
    gate        who may read next: slots, a cap on bandwidth, a start before a prefetch; the decision is pure
    progress    rate, time left, stalls; pure
    journal     what survives a crash: per chunk the BLAKE3 of what was on the disk
    engine      threads that carry it out: `Downloader`

Everything blocks and runs in threads of its own. It knows nothing of digests' meaning, of stores or of RPCs: the result
is a file that is complete, on the disk, and has the sha256 that was asked for.
"""
