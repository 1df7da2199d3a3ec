"""xDS: what Envoy is told at run time: the endpoints of the cluster ``replicas``, and the express lane.

``state`` is pure and decides what each Envoy gets and who has acknowledged what; ``server`` is the ADS servicer
(delta protocol, xds-protos) around it, with ``publish`` and ``wait_acked`` for the proxy. Everything else of Envoy's
configuration is static.

Invariants: nothing is published before ``open()``; a version is acknowledged by an Envoy only when Envoy said so,
which it does after its workers route by it; an Envoy that reconnects gets everything again.
"""
