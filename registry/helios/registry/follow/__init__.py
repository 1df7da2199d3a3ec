"""Followed sources: a model is pulled again when the place that it comes from has something else.

A place is looked at by its metadata alone: commit, digests, ETags. What it had is kept as a fingerprint, in the
database like everything else of it, so a registry that restarts goes on. What a new revision does to requests is a
policy.
"""
