"""The proxy: decides where each request goes, holds it while a model starts, and tells workers what to run.

It may know the contracts (`helios.api`), the mesh library and Envoy's protocols; of the other components it
knows their `client` modules only. Bytes of requests and answers never pass through it: Envoy asks, the proxy answers.

Invariants:
    * A model that the registry knows is never answered with 404, with the registry up or down.
    * A request is sent only to a replica whose endpoint every Envoy has acknowledged.
    * One activation a model at a time, whatever the number of requests that wait for it.
    * Everything that waits is bounded in count, bytes and time, and ends with a machine-readable reason.
"""
