"""Admission: who asks, what they may use, how much of it, and in which order they are served where there is a queue.

Pure but for `session`, which feeds the keys. A request without a key, where none is required, costs one comparison.
"""
