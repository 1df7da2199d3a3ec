"""How people see that a model's weights are on their way."""

import io

from rich.console import Console

from helios.api.admin.v1 import admin_service_pb2 as admin_pb
from helios.api.catalog.v1 import model_service_pb2 as catalog_pb
from helios.api.fleet.v1 import types_pb2 as fleet_pb
from helios.cli.commands import model_table, replica_table
from helios.cli.transfer_progress import fetch_text


def test_a_fetch_in_words() -> None:
    assert fetch_text(410, 1000, 12_000_000.0, 75.2) == "41% at 11.4 MiB/s, 0:01:15 left"
    assert fetch_text(410, 1000, 0.0, None) == "41%, standing still"


def test_models_and_replicas_show_their_fetch() -> None:
    model = catalog_pb.Model(id="m", state=catalog_pb.MODEL_STATE_STARTING)
    model.fetch.CopyFrom(
        catalog_pb.ModelFetch(done_bytes=1, total_bytes=4, bytes_per_second=2e6, remaining_seconds=3600.0)
    )
    replica = fleet_pb.Replica(replica_id="r", model="m", state=fleet_pb.REPLICA_STATE_FETCHING)
    replica.fetch.CopyFrom(fleet_pb.FetchProgress(done_bytes=3, total_bytes=4))
    shown = io.StringIO()
    console = Console(file=shown, width=250)
    console.print(model_table([model]))
    console.print(replica_table(admin_pb.ListReplicasResponse(replicas=[admin_pb.ReplicaOnWorker(replica=replica)])))
    assert "starting, 25% at 1.9 MiB/s, 1:00:00 left" in shown.getvalue()
    assert "fetching, 75%, standing still" in shown.getvalue()
