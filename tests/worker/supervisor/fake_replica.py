"""A replica without an engine: the processes and the conversation are real, the rest is not there.

Run as ``python fake_replica.py SPEC`` in a session of its own; SPEC is a ReplicaSpec's document with a ``behaviour``:
``normal``; ``hasty`` is ready before its weights were lent; ``stubborn`` ignores SIGTERM and drains; ``hang`` never
says hello; ``broken`` reports a failure; ``silent`` says hello once and never again; ``drowsy`` can sleep; ``muddled``
can, too, and fails its canary after waking. Like vLLM's, it is three processes: front, EngineCore, Worker.
"""

import json
import os
import queue
import signal
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

_SLEEPERS = ("drowsy", "muddled")


def main() -> None:
    """Lives as the spec's behaviour says."""
    document = json.loads(sys.argv[1])
    behaviour = document["behaviour"]
    if behaviour == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _fork_engine()
    if behaviour == "hang":
        time.sleep(600)
    _converse(document, behaviour)


def _fork_engine() -> None:
    if os.fork() == 0:
        os.fork()
        # Nobody asks these to end: they are what stays behind when a front is killed.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)
        os._exit(0)


def _converse(document: dict[str, object], behaviour: str) -> None:
    # Imported after the fork: gRPC's threads would not be copied.
    grpc: Any = import_module("grpc")
    types: Any = import_module("helios.api.fleet.v1.types_pb2")
    pb: Any = import_module("helios.api.worker.v1.supervisor_service_pb2")
    attach_stub: Any = import_module("helios.api.worker.v1.supervisor_service_pb2_grpc").SupervisorServiceStub

    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    replica = types.Replica(
        replica_id=str(document["replica_id"]),
        model=str(document["model"]),
        revision=str(document["revision"]),
        engine=str(document["engine"]),
        pid=os.getpid(),
        memory_bytes=int(str(document["memory_bytes"])),
        state=types.REPLICA_STATE_LOADING,
    )
    address = f"{document['host']}:{document['port']}"
    while True:
        # A new channel each time: a blocking client has no cheaper way to forget the back-off of the old one.
        with grpc.insecure_channel(str(document["supervisor_address"])) as channel:
            outgoing: queue.Queue[Any] = queue.Queue()
            hello = pb.ReplicaHello(replica=replica, start_ticks=ticks, lease_id=str(document["lease_id"]))
            outgoing.put(pb.AttachRequest(hello=hello))
            try:
                for response in attach_stub(channel).Attach(iter(outgoing.get, None)):
                    kind = response.WhichOneof("message")
                    if kind == "stop" or (kind == "drain" and behaviour != "stubborn"):
                        outgoing.put(None)
                        sys.exit(0)
                    if kind == "sleep":
                        replica.state = types.REPLICA_STATE_ASLEEP
                        outgoing.put(pb.AttachRequest(asleep=pb.ReplicaAsleep(left_bytes=64 << 20)))
                    if kind == "adapters":
                        _take_adapters(types, replica, response.adapters.adapters)
                        outgoing.put(pb.AttachRequest(adapters=pb.ReplicaAdapters(adapters=replica.adapters)))
                    if kind == "wake":
                        replica.state = types.REPLICA_STATE_READY
                        outgoing.put(_woken(pb, types, address, behaviour))
                    if kind == "welcome" and replica.state == types.REPLICA_STATE_LOADING:
                        for message in _start(pb, types, address, behaviour):
                            if message.HasField("ready") and document["early_door"] and behaviour != "hasty":
                                _wait_lent(document)
                            outgoing.put(message)
                        replica.state = types.REPLICA_STATE_READY
                        replica.address, replica.max_context_tokens = address, 512
                        replica.can_sleep = behaviour in _SLEEPERS
            except grpc.RpcError:
                if behaviour == "silent":
                    time.sleep(600)
            outgoing.put(None)
        time.sleep(0.05)


def _wait_lent(document: dict[str, object]) -> None:
    arrivals: Any = import_module("helios.worker.early.asking").Arrivals
    arrivals(str(document["early_door"]), document["replica_id"], str(document["model_path"])).wait_whole()


def _take_adapters(types: Any, replica: Any, wanted: Any) -> None:
    """Loads what has a directory, but for the one called bad; one called busy has a request that does not end."""
    busy = [one for one in replica.adapters if one.adapter.name == "busy"]
    del replica.adapters[:]
    for files in wanted:
        state = types.ADAPTER_STATE_LOADED if files.path else types.ADAPTER_STATE_LOADING
        failure = None
        if files.adapter.name == "bad":
            state, failure = types.ADAPTER_STATE_FAILED, types.ReplicaFailure(reason="BAD_ADAPTER", message="no LoRA")
        replica.adapters.add(adapter=files.adapter, state=state, failure=failure)
    if busy and all(files.adapter.name != "busy" for files in wanted):
        replica.adapters.add(adapter=busy[0].adapter, state=types.ADAPTER_STATE_UNLOADING)


def _start(pb: Any, types: Any, address: str, behaviour: str) -> Iterator[Any]:
    if behaviour == "broken":
        yield pb.AttachRequest(failed=types.ReplicaFailure(reason="ENGINE_FAILED", message="no such weights"))
        return
    phase = types.PhaseTiming(phase="load")
    phase.duration.FromMilliseconds(20)
    yield pb.AttachRequest(progress=pb.ReplicaProgress(state=types.REPLICA_STATE_WARMING, phase=phase))
    can_sleep = behaviour in _SLEEPERS
    yield pb.AttachRequest(ready=pb.ReplicaReady(address=address, max_context_tokens=512, can_sleep=can_sleep))


def _woken(pb: Any, types: Any, address: str, behaviour: str) -> Any:
    if behaviour == "muddled":
        return pb.AttachRequest(failed=types.ReplicaFailure(reason="CANARY_FAILED", message="other tokens"))
    return pb.AttachRequest(ready=pb.ReplicaReady(address=address, max_context_tokens=512, can_sleep=True))


if __name__ == "__main__":
    main()
