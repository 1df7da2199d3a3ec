"""gRPC served over asyncio alone, for the paths where each message counts: token streams and endpoint picks.

grpc.aio hands every message to a C core with threads of its own: some 70 µs of CPU and one system call for each message
of each stream. Here the event loop's own transport carries the connection, and what all streams of a connection made
in one turn of the loop leaves in one write.

It mounts what grpc.aio mounts (generated `add_XServicer_to_server` functions, health, reflection, interceptors), and
servicers can't tell the two apart. `helios.mesh.server` chooses; nothing else imports this package.

Invariants: a connection's error ends that connection alone; whatever a peer does not read is bounded; a stream that its
peer cancels has its handler cancelled in the same turn of the loop.

- `wire` — framing, metadata, timeouts (pure)
- `limits` — bounds of a connection, and the count of what a peer does for nothing (pure)
- `headers` — header blocks: hpack's to read, stateless to send (pure)
- `protocol` — the server's side of HTTP/2: bytes in, calls and bytes out (pure)
- `tls` — the server's TLS context, which follows renewals
- `sender` — what goes out: flow control and one write a turn
- `connection` — what comes in: streams become calls; keepalive, drain
- `call` — one stream as the servicer context that handlers know
- `question` — one stream that a function answers at once
- `dispatch` — from a path to its handler, and from what the handler did to a status
- `server` — listening, registration, the end
"""
