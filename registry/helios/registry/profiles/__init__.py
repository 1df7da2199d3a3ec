"""What a revision needs of devices: how it can be split, where it fits, which modules stay whole, what was measured.

The facts that every start needs are the revision's own profile (``registry.profile``), computed at its ingest. What
stands here is computed when somebody asks: from config.json and the headers of the weights, without reading a tensor.
"""
