"""The command ``helios``: runs the whole mesh on one machine, and talks to one that runs.

The only package above the components: it starts them as processes, and uses their ``client`` modules. It owns the state
directory's layout, the private CA of the machine, and the life of the processes, nothing else.
"""
