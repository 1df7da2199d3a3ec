"""Storage agent: keeps model revisions on a node and lends them to replicas.

It may know the registry's client and the mesh; it knows nothing of workers, engines or routing. Invariants: a blob
under its final name is complete and verified; a leased revision is never evicted; a crash at any instruction leaves
nothing that the next start doesn't repair.
"""
