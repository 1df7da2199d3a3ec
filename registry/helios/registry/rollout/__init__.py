"""Rollouts: a share of a model's requests goes to another revision, until that one is served or given up.

What a rollout is stands with the model (``records.Rollout``), what was done to it in steps of its own. Proxies split
the requests; the registry never sees one.
"""
