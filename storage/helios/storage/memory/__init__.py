"""The tier of sealed memory files: blobs in memfds that holders get as descriptors and hand back after a restart.

Invariants: a file counts only when its sha256 was taken of bytes that nobody can change any more, or of what was
written into it; a file that a holder has lives as long as the holder does, whatever becomes of the agent.
"""
