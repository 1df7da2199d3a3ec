"""Envoy's side of the gateway: its configuration, its error bodies, its process.

``edge_config`` turns EdgeSettings into a bootstrap that is typed by envoy-data-plane; ``install`` writes it with the
SDS files beside it; ``process`` says how to run and check Envoy; ``admin`` talks to its administration socket.
Nothing here runs per request. What Envoy is told at run time (endpoints) is in ``helios.mesh.xds``.

DESIGN.md in this folder has the filters, the routes, and the traps.
"""
