"""Between the contract's messages of LoRA adapters and the worker's words; used by replica and supervisor."""

from helios.api.engine.v1 import engine_settings_pb2
from helios.api.fleet.v1 import types_pb2 as fleet
from helios.api.worker.v1 import supervisor_service_pb2 as pb
from helios.worker.replica.adapter_state import AdapterFiles, AdapterState, AdapterStatus
from helios.worker.replica.settings import LoraAdapter


def adapter_from_proto(message: engine_settings_pb2.LoraAdapter) -> LoraAdapter:
    """Returns an adapter."""
    return LoraAdapter(message.name, message.model, message.revision)


def status_from_proto(message: fleet.ReplicaAdapter) -> AdapterStatus:
    """Returns where an adapter stands; a state of a newer version counts as on its way."""
    adapter = adapter_from_proto(message.adapter)
    name = fleet.AdapterState.Name(message.state) if message.state in fleet.AdapterState.values() else ""
    known = name.removeprefix("ADAPTER_STATE_")
    state = AdapterState(known) if known in AdapterState.__members__ else AdapterState.LOADING
    return AdapterStatus(adapter, state, message.failure.reason, message.failure.message)


def status_to_proto(status: AdapterStatus) -> fleet.ReplicaAdapter:
    """Returns the message of an adapter's state."""
    message = fleet.ReplicaAdapter(
        adapter=_to_proto(status.adapter), state=fleet.AdapterState.Value(f"ADAPTER_STATE_{status.state.value}")
    )
    if status.reason:
        message.failure.reason, message.failure.message = status.reason, status.message
    return message


def files_from_proto(message: pb.AdapterFiles) -> AdapterFiles:
    """Returns an adapter that is wanted, and its directory."""
    return AdapterFiles(adapter_from_proto(message.adapter), message.path)


def files_to_proto(files: AdapterFiles) -> pb.AdapterFiles:
    """Returns the message of an adapter that is wanted."""
    return pb.AdapterFiles(adapter=_to_proto(files.adapter), path=files.path)


def _to_proto(adapter: LoraAdapter) -> engine_settings_pb2.LoraAdapter:
    return engine_settings_pb2.LoraAdapter(name=adapter.name, model=adapter.model, revision=adapter.revision)
