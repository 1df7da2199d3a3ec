"""A replica: one model, its engine, and a gRPC server of its own, in a process forked from the launcher.

May know: the mesh library, the wire contracts of inference and of the worker, and the ``Engine`` protocol; never vLLM
or torch (those are the adapters'). Invariants: nothing that starts a thread runs before the engine has forked its own
processes; when the front process is gone, every descendant is gone; a request that was taken is reported as started
and as finished exactly once; a draining replica takes nothing new.
"""
