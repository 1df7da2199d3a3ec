"""The time that Helios adds to a warm unary request, over Envoy alone.

Two Envoys of the same binary stand before the same replica: one with Helios's own configuration, its picks answered by
the real proxy process; one with a plain configuration (transcoder, router, mTLS to the replica, nothing else). A client
sends 200 requests a second to one, then to the other, in short batches that take turns. What is reported is the median,
over all rounds, of the difference between the batches' medians (and of their 99th percentiles): what else the machine
does hits both batches of a round alike.
"""

import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from helios.mesh.envoy.bootstrap import edge_config, install
from helios.mesh.envoy.process import command
from helios.mesh.envoy.settings import EdgeSettings
from helios.mesh.identity import CertificateAuthority, IdentityFiles
from helios.mesh.settings import to_arguments
from tests.benchmarks import edge_peers
from tests.benchmarks.children import Children
from tests.benchmarks.open_loop import Connections
from tests.ports import free_port

ROOT: Final = Path(__file__).resolve().parents[2]
ROUNDS: Final = 24
BATCH: Final = 300
PER_SECOND: Final = 200.0
# Requests that the 99th percentile of a busy second overlaps with.
CONNECTIONS: Final = 16
START_SECONDS: Final = 30.0
BODY: Final = json.dumps({"model": edge_peers.MODEL, "messages": [{"role": "user", "content": "hello " * 40}]}).encode()
COMPONENTS: Final = ("proxy", "worker", "registry", "edge", "admin-edge")
_KEPT_FILTERS: Final = ("envoy.filters.http.grpc_json_transcoder", "envoy.filters.http.router")
_OWN_MANAGER_FIELDS: Final = ("earlyHeaderMutationExtensions", "localReplyConfig", "accessLog", "tracing")


def run() -> list[dict[str, Any]]:
    """Measures both, in turns; `baseline` is Envoy alone, in milliseconds."""
    # A short path: a unix socket's has at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="hb") as name, Children(Path(name, "logs")) as children:
        helios_port, plain_port = _start(Path(name), children)
        with ExitStack() as stack:
            sides = [
                stack.enter_context(Connections(port, CONNECTIONS, _request())) for port in (helios_port, plain_port)
            ]
            for side in sides:
                side.run(BATCH, PER_SECOND)
            rounds = [_round(sides, is_turned=bool(number % 2)) for number in range(ROUNDS)]
    return [
        _result("edge.added_latency_p50", rounds, statistics.median),
        _result("edge.added_latency_p99", rounds, lambda seconds: statistics.quantiles(seconds, n=100)[98]),
    ]


def _round(sides: list[Connections], *, is_turned: bool) -> tuple[list[float], list[float]]:
    """One batch each; the order turns round, so that none always runs after the same other one."""
    order = sides[::-1] if is_turned else sides
    batches = {id(side): side.run(BATCH, PER_SECOND) for side in order}
    return batches[id(sides[0])], batches[id(sides[1])]


def _result(
    name: str, rounds: list[tuple[list[float], list[float]]], summary: Callable[[list[float]], float]
) -> dict[str, Any]:
    helios, plain = zip(*(map(summary, batches) for batches in rounds), strict=True)
    return {
        "name": name,
        "value": round(statistics.median(h - p for h, p in zip(helios, plain, strict=True)) * 1e3, 3),
        "unit": "ms",
        "baseline": round(statistics.median(plain) * 1e3, 3),
        "samples": ROUNDS * BATCH,
    }


def _start(directory: Path, children: Children) -> tuple[int, int]:
    """Starts everything; returns the ports of both Envoys once they answer."""
    authority = CertificateAuthority.open(directory / "ca")
    for component in COMPONENTS:
        authority.issue(component, directory / "pki" / component)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # noqa: TID251 - the processes get what this one has
    peers = [sys.executable, "-m", "tests.benchmarks.edge_peers", str(directory)]
    children.start("peers", peers, environment)
    address_file = directory / edge_peers.ADDRESS_FILE
    children.wait(address_file.exists, START_SECONDS, "the replica listens")
    ready = directory / "proxy.ready"
    children.start("proxy", _proxy(directory, ready), environment)
    children.wait(ready.exists, START_SECONDS, "the proxy is ready")
    helios = _settings(directory, "helios")
    children.start("helios", command(install(helios)), environment)
    plain = _settings(directory, "plain")
    children.start("plain", command(_install_plain(plain, address_file.read_text())), environment)
    for settings in (helios, plain):
        children.wait(lambda: _answers(settings.edge_port), START_SECONDS, "the edge answers")  # noqa: B023 (at once)
    return helios.edge_port, plain.edge_port


def _proxy(directory: Path, ready: Path) -> list[str]:
    settings = {
        "mesh": {"tls": "files", "identity_directory": directory / "pki" / "proxy"},
        "state_directory": directory / "proxy",
        "control_listen": f"unix:{directory}/{edge_peers.CONTROL_SOCKET}",
        "picker_listen": f"unix:{directory}/picker.sock",
        "registry_target": f"unix:{directory}/{edge_peers.REGISTRY_SOCKET}",
    }
    return [sys.executable, "-m", "helios.proxy", f"--ready-file={ready}", *to_arguments(settings)]


def _settings(directory: Path, name: str) -> EdgeSettings:
    return EdgeSettings(
        directory=directory / name,
        envoy_admin=f"unix:{directory}/{name}.sock",
        admin_token="token-of-this-benchmark-0123456789",
        picker=(f"unix:{directory}/picker.sock",),
        control=(f"unix:{directory}/{edge_peers.CONTROL_SOCKET}",),
        registry=(f"unix:{directory}/{edge_peers.REGISTRY_SOCKET}",),
        edge_identity=_identity(directory, "edge"),
        admin_identity=_identity(directory, "admin-edge"),
        edge_port=free_port(),
        admin_port=free_port(),
        access_log=directory / f"{name}.access.log",
    )


def _install_plain(settings: EdgeSettings, replica_address: str) -> Path:
    """Writes the plain configuration: of Helios's own, the transcoder, the router and the replica's cluster with its
    mTLS, its endpoint fixed.
    """
    install(settings)  # the secrets' files
    config: Any = edge_config(settings).to_dict()
    static = config["staticResources"]
    listener = next(entry for entry in static["listeners"] if entry["name"] == "edge")
    manager = listener["filterChains"][0]["filters"][0]["typedConfig"]
    manager["httpFilters"] = [entry for entry in manager["httpFilters"] if entry["name"] in _KEPT_FILTERS]
    for field in _OWN_MANAGER_FIELDS:
        manager.pop(field, None)
    # The last one of the service is for all of its methods.
    routes = manager["routeConfig"]["virtualHosts"][0]["routes"]
    route = next(r for r in reversed(routes) if "OpenAI" in r["match"].get("prefix", ""))
    del route["route"]["retryPolicy"]
    manager["routeConfig"]["virtualHosts"] = [{"name": "plain", "domains": ["*"], "routes": [route]}]
    cluster = next(entry for entry in static["clusters"] if entry["name"] == "replicas")
    for field in ("edsClusterConfig", "loadBalancingPolicy"):
        del cluster[field]
    host, _, port = replica_address.rpartition(":")
    address = {"socketAddress": {"address": host, "portValue": int(port)}}
    cluster["type"] = "STATIC"
    cluster["loadAssignment"] = {
        "clusterName": cluster["name"],
        "endpoints": [{"lbEndpoints": [{"endpoint": {"address": address}}]}],
    }
    plain = {"node": config["node"], "staticResources": {"listeners": [listener], "clusters": [cluster]}}
    path = settings.directory / "plain.json"
    path.write_text(json.dumps(plain, indent=1))
    return path


def _identity(directory: Path, component: str) -> IdentityFiles:
    return IdentityFiles(directory / "pki" / component)


def _answers(port: int) -> bool:
    try:
        with Connections(port, 1, _request()) as connection:
            return bool(connection.run(1, PER_SECOND))
    except (OSError, RuntimeError):
        return False


def _request() -> bytes:
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: edge\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(BODY)}\r\n\r\n".encode() + BODY


if __name__ == "__main__":
    for entry in run():
        print(entry)
