"""The supervisor of one node's replicas: decides with pure state machines, acts on processes, reports to every proxy.

May know: the launcher's client, the storage client, mesh and the contracts. Must not know: engines, vLLM, the proxy.

Invariants:
- Memory and port of a replica are free only when its whole process tree is gone.
- A process is named by pid and start time, never by pid alone.
- Losing a proxy, the launcher or the storage agent stops no replica; a restart of the supervisor stops none either.
- A command that comes twice is carried out once.
"""
