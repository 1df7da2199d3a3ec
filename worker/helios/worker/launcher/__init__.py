"""The launcher: a process that has imported everything once, from which replicas are forked in milliseconds.

May know: the standard library, the engines' ``preload`` hook and the replica's ``main``. Invariants of the launcher
process: one thread, no device touched, no channel or server made, nothing imported twice; its death does not touch
its replicas.
"""
