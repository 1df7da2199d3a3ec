"""A gateway to be measured: the real proxy process and Envoy with Helios's own configuration, before replicas in C.

Beside it, where asked for, an Envoy of the same binary with a plain configuration: transcoder, router, mTLS to one
replica, nothing else.
"""

import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import psutil

from helios.mesh.envoy.bootstrap import edge_config, install
from helios.mesh.envoy.process import command
from helios.mesh.envoy.settings import EdgeSettings
from helios.mesh.identity import CertificateAuthority, IdentityFiles
from helios.mesh.settings import to_arguments
from tests.benchmarks import edge_peers
from tests.benchmarks.children import Children, cpu_seconds
from tests.benchmarks.compiled import LoadClient, build
from tests.ports import free_port

ROOT: Final = Path(__file__).resolve().parents[2]
START_SECONDS: Final = 30.0
COMPONENTS: Final = ("proxy", "worker", "registry", "edge", "admin-edge")
_KEPT_FILTERS: Final = ("envoy.filters.http.grpc_json_transcoder", "envoy.filters.http.router")
_OWN_MANAGER_FIELDS: Final = ("earlyHeaderMutationExtensions", "localReplyConfig", "accessLog", "tracing")
# Conversations that requests are of: as many beginnings for prefix affinity to tell apart.
_TALKS: Final = 64
_PROMPT_BYTES: Final = 1000


@dataclass
class EdgeMesh:
    """What runs. ``http`` are the plain servers of the replicas' process, ``replicas`` those by model."""

    directory: Path
    children: Children
    http: list[str]
    replicas: dict[str, list[str]]
    port: int
    proxy: psutil.Process
    envoy: psutil.Process
    environment: dict[str, str] = field(repr=False)

    def client(self, model: str, *, headers: str = "", **more: object) -> LoadClient:
        """A client of a model's, with requests of many conversations; ``headers`` are more lines of each."""
        return LoadClient(self.directory / "load", requests(model, headers=headers, **more))

    def gateway_seconds(self) -> float:
        """CPU time that the gateway has taken."""
        return cpu_seconds(self.proxy.pid) + cpu_seconds(self.envoy.pid)

    def start_plain(self, replica: str) -> int:
        """Starts the plain Envoy before a replica; returns its port."""
        settings = _settings(self.directory, "plain", has_tls=True)
        self.children.start("plain", command(_install_plain(settings, replica)), self.environment)
        self.wait_answers(self.directory / "load", settings.edge_port, next(iter(self.replicas)))
        return settings.edge_port

    def wait_answers(self, program: Path, port: int, model: str) -> None:
        """Waits until a port answers requests of a model."""
        client = LoadClient(program, requests(model))
        self.children.wait(lambda: _answers(client, port), START_SECONDS, f"port {port} answers")


def requests(model: str, *, headers: str = "", **more: object) -> list[bytes]:
    """Requests as they go on the wire: a talk each, whose prompt begins with the talk's number."""
    bodies = []
    for talk in range(_TALKS):
        text = f"Talk {talk:04d}. " + "hello " * (_PROMPT_BYTES // 6)
        messages = [{"role": "system", "content": text}, {"role": "user", "content": "And now?"}]
        bodies.append(json.dumps({"model": model, "messages": messages, **more}).encode())
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: edge\r\ncontent-type: application/json\r\n"
    head += f"{headers}content-length: "
    return [f"{head}{len(body)}\r\n\r\n".encode() + body for body in bodies]


@contextmanager
def running_edge(
    models: Mapping[str, int],
    *,
    http_count: int = 0,
    resting_count: int = 0,
    has_tls: bool = True,
    proxy: Mapping[str, Any] | None = None,
) -> Iterator[EdgeMesh]:
    """Starts everything, with so many ready replicas by model; ``proxy`` are more settings of the proxy.

    Without ``has_tls`` it is a mesh whose sidecars see to TLS, and has none: nothing is encrypted.
    """
    # A short path: a unix socket's has at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="hb") as name, Children(Path(name, "logs")) as children:
        directory = Path(name)
        for program in ("worker", "load"):
            build(program, directory)
        authority = CertificateAuthority.open(directory / "ca")
        for component in COMPONENTS:
            authority.issue(component, directory / "pki" / component)
        # The processes get what this one has.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}  # noqa: TID251
        edge_peers.write_wanted(
            directory,
            program=str(directory / "worker"),
            models=dict(models),
            http_count=http_count,
            resting_count=resting_count,
            has_tls=has_tls,
        )
        peers = [sys.executable, "-m", "tests.benchmarks.edge_peers", str(directory)]
        children.start("peers", peers, environment)
        address_file = directory / edge_peers.ADDRESS_FILE
        children.wait(address_file.exists, START_SECONDS, "the replicas listen")
        addresses = json.loads(address_file.read_text())
        ready = directory / "proxy.ready"
        proxy_process = children.start("proxy", _proxy(directory, ready, proxy or {}, has_tls=has_tls), environment)
        children.wait(ready.exists, START_SECONDS, "the proxy is ready")
        settings = _settings(directory, "helios", has_tls=has_tls)
        envoy = children.start("helios", command(install(settings)), environment)
        found = EdgeMesh(
            directory,
            children,
            addresses[:http_count],
            _by_model(models, addresses[http_count:]),
            settings.edge_port,
            proxy_process,
            envoy,
            environment,
        )
        for model in models:
            found.wait_answers(directory / "load", found.port, model)
        yield found


def _by_model(models: Mapping[str, int], addresses: Sequence[str]) -> dict[str, list[str]]:
    left = iter(addresses)
    return {model: [next(left) for _ in range(count)] for model, count in models.items()}


def _answers(client: LoadClient, port: int) -> bool:
    try:
        return bool(client.paced(port, connections=1, per_second=100, count=1))
    except RuntimeError:
        return False


def _proxy(directory: Path, ready: Path, more: Mapping[str, Any], *, has_tls: bool) -> list[str]:
    files = {"tls": "files", "identity_directory": directory / "pki" / "proxy"}
    settings = {
        "mesh": files if has_tls else {"tls": "off"},
        "state_directory": directory / "proxy",
        "control_listen": f"unix:{directory}/{edge_peers.CONTROL_SOCKET}",
        "picker_listen": f"unix:{directory}/picker.sock",
        "registry_target": f"unix:{directory}/{edge_peers.REGISTRY_SOCKET}",
        **more,
    }
    return [sys.executable, "-m", "helios.proxy", f"--ready-file={ready}", *to_arguments(settings)]


def _settings(directory: Path, name: str, *, has_tls: bool) -> EdgeSettings:
    return EdgeSettings(
        directory=directory / name,
        envoy_admin=f"unix:{directory}/{name}.sock",
        admin_token="token-of-this-benchmark-0123456789",
        picker=(f"unix:{directory}/picker.sock",),
        control=(f"unix:{directory}/{edge_peers.CONTROL_SOCKET}",),
        registry=(f"unix:{directory}/{edge_peers.REGISTRY_SOCKET}",),
        edge_identity=_identity(directory, "edge") if has_tls else None,
        admin_identity=_identity(directory, "admin-edge") if has_tls else None,
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
    for name in _OWN_MANAGER_FIELDS:
        manager.pop(name, None)
    # The last one of the service is for all of its methods.
    routes = manager["routeConfig"]["virtualHosts"][0]["routes"]
    route = next(r for r in reversed(routes) if "OpenAI" in r["match"].get("prefix", ""))
    del route["route"]["retryPolicy"]
    manager["routeConfig"]["virtualHosts"] = [{"name": "plain", "domains": ["*"], "routes": [route]}]
    cluster = next(entry for entry in static["clusters"] if entry["name"] == "replicas")
    for name in ("edsClusterConfig", "loadBalancingPolicy"):
        del cluster[name]
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
