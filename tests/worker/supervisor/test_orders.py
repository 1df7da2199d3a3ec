"""From a StartReplica to an order: which engine, and with which options."""

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from helios.api.engine.v1 import engine_settings_pb2
from helios.api.fleet.v1 import fleet_service_pb2 as fleet
from helios.mesh.errors import InvalidRequest
from helios.worker.supervisor.commands import Start
from helios.worker.supervisor.orders import order_of
from helios.worker.supervisor.records import Order
from helios.worker.supervisor.wire import command_from_proto
from tests.worker.supervisor.fakes import REVISION, RULES

ALL = replace(RULES, engines=("vllm", "custom", "simulated"), default_engine="vllm")


def order(engine: str, settings_engine: str = "", *, default: str = "vllm", **options: str) -> Order:
    settings = engine_settings_pb2.EngineSettings(engine=settings_engine, options=options)
    message = fleet.StartReplica(replica_id="r1", model="m", revision=REVISION, engine=engine, engine_settings=settings)
    start = command_from_proto(fleet.Command(command_id="c1", start=message))
    assert isinstance(start, Start)
    return order_of(start, replace(ALL, default_engine=default), datetime.now(UTC))


def test_an_engine_is_taken_from_the_command_then_the_settings_then_the_worker() -> None:
    assert order("simulated", "custom:a:B").engine == "simulated"
    assert order("", "simulated").engine == "simulated"
    assert order("").engine == "vllm"
    assert (order("", default="custom:a:B").engine, order("", default="custom:a:B").options) == (
        "custom",
        {"class": "a:B"},
    )


def test_the_class_of_a_custom_engine_is_an_option_among_others() -> None:
    made = order("custom:a.b:C", stream="true")
    assert (made.engine, made.options) == ("custom", {"class": "a.b:C", "stream": "true"})
    assert order("custom", **{"class": "entry-point"}).options == {"class": "entry-point"}


def test_an_engine_that_is_not_installed_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="there are: vllm, custom, simulated") as caught:
        order("transformers")
    assert caught.value.reason == "UNKNOWN_ENGINE"
