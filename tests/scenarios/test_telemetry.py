"""Traces and metrics of the whole mesh, as a collector and Prometheus get them."""

import secrets
import urllib.request

from prometheus_client.parser import text_string_to_metric_families

from helios.mesh import names
from tests.scenarios.collector import Collector
from tests.scenarios.running_mesh import RunningMesh


def test_a_request_is_one_trace_through_envoy_and_the_replica(mesh: RunningMesh, collector: Collector) -> None:
    # One that is held has a span of the proxy's, too.
    assert mesh.chat().status == 200
    trace_id = secrets.token_hex(16)
    header = {"traceparent": f"00-{trace_id}-{secrets.token_hex(8)}-01"}
    body = b'{"model": "smollm2", "prompt": "The capital of France is", "max_tokens": 4}'
    assert mesh.request("/v1/completions", body, headers=header).status == 200
    mesh.wait(lambda: len(collector.trace(trace_id)) >= 2, 20, "spans of two services")
    trace = collector.trace(trace_id)
    assert trace["helios-replica"] == {"completion"}
    assert len(trace) == 2


def test_a_cold_start_is_traced_from_the_proxy_to_the_replica(mesh: RunningMesh, collector: Collector) -> None:
    mesh.go_cold()
    assert mesh.chat().status == 200
    mesh.wait(lambda: "activate" in collector.names("helios-proxy"), 20, "the activation's span")
    mesh.wait(lambda: "replica start" in collector.names("helios-replica"), 20, "the start's span")


def test_every_process_tells_prometheus_its_own_metrics(mesh: RunningMesh) -> None:
    assert mesh.chat().status == 200
    expected = {
        "registry": names.MODELS,
        "storage": names.TIER_USED_BYTES,
        "proxy": names.PICKS_TOTAL,
        "worker": names.DEVICE_BOOKED_BYTES,
    }
    for name, metric in expected.items():
        address = mesh.process(name)["ops_address"]
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as response:
            text = response.read().decode()
        families = text_string_to_metric_families(text)
        samples = [sample for family in families for sample in family.samples if sample.name == metric]
        assert any(sample.value > 0 for sample in samples), name
        for path in ("healthz", "readyz"):
            with urllib.request.urlopen(f"http://{address}/{path}", timeout=10) as response:
                assert response.status == 200
