"""What every Helios process shares: identity, servers and channels, errors, settings, logs, telemetry, Envoy's
configuration.

The package knows the contracts in ``helios.api`` and nothing of the components above it. Invariants: every server
authenticates its callers and checks which component may call which service; every error crosses a process boundary as
one ``google.rpc.Status`` made in one place; every process starts, reports readiness and stops the same way.
"""
