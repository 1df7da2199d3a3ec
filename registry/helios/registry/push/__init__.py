"""Pushing: a revision's blobs and manifest to an OCI registry, by CNCF ModelPack.

The manifest that is pushed is the revision's own, byte for byte, so the digest there is the revision. Only what the
target does not have is sent; what arrived of a push that broke off is not sent again.
"""
