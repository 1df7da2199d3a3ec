"""Start-up artifacts: what a start made (compiled code) and other starts, here and elsewhere, can use.

The replica asks its supervisor before it makes one, and says when one has proved good; the supervisor fetches from and
publishes to the registry. Invariants: an artifact is never the only copy, so nothing here fails a start; what a start
left behind that did not end well is never used again; a replica that needs no artifact pays nothing.
"""
