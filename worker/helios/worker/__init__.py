"""The worker: everything that runs models on one node.

Three kinds of processes: the supervisor (``supervisor``, one, decides and reports), the launcher (``launcher``, one,
holds the imports and forks), replicas (``replica`` with an engine of ``engines``, one a model). Invariants: bytes of
answers never pass the supervisor; the death of supervisor or launcher ends no replica; the death of a replica's front
process ends its tree.
"""
