"""What the launcher and the replica's process call to have a simulated engine."""

from helios.worker.engines.simulated.engine import SimulatedEngine
from helios.worker.replica.engine import Engine, EngineHooks
from helios.worker.replica.spec import ReplicaSpec


def preload() -> None:
    """There is nothing to import."""


def build(spec: ReplicaSpec, hooks: EngineHooks) -> Engine:
    """Makes the engine, in the time that its options give to a start."""
    return SimulatedEngine(spec, hooks)
