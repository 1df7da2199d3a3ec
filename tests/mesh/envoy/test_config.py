"""The configuration: Envoy itself takes it, and what it must and must not hold."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helios.mesh.envoy import rest, routes
from helios.mesh.envoy.bootstrap import edge_config, install
from helios.mesh.envoy.headers import all_names_but
from helios.mesh.envoy.pack import address
from helios.mesh.envoy.process import binary, command, validate
from helios.mesh.envoy.settings import EdgeSettings
from helios.mesh.errors import InvalidRequest
from helios.mesh.identity import CertificateAuthority
from helios.proxy.settings import ProxySettings

TOKEN = "a-token-that-is-secret"


def settings(directory: Path, **changes: Any) -> EdgeSettings:
    authority = CertificateAuthority.open(directory / "pki")
    fields: dict[str, Any] = {
        "directory": directory / "envoy",
        "envoy_admin": f"unix:{directory}/envoy.sock",
        "admin_token": TOKEN,
        "picker": ("127.0.0.1:7001", f"unix:{directory}/proxy.sock"),
        "control": ("127.0.0.1:7001",),
        "registry": ("127.0.0.1:7002",),
        "relay": ("127.0.0.1:7003",),
        "edge_identity": authority.issue("edge", directory / "pki" / "edge"),
        "admin_identity": authority.issue("admin-edge", directory / "pki" / "admin-edge"),
    }
    return EdgeSettings(**(fields | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"edge_identity": None, "admin_identity": None},
        {"relay": ()},
        {"otlp_endpoint": "127.0.0.1:4317"},
        {"edge_host": "::1", "admin_host": "::1"},
        {"edge_host": "0.0.0.0", "access_log": Path("access.log"), "namespace": "prod", "trust_domain": "example.org"},
    ],
    ids=["plain", "no-tls", "no-relay", "tracing", "ipv6", "all-interfaces"],
)
def test_envoy_takes_it(tmp_path: Path, changes: dict[str, Any]) -> None:
    if "access_log" in changes:
        changes = changes | {"access_log": tmp_path / "access.log"}
    validate(install(settings(tmp_path, **changes)))


def test_what_envoy_refuses_is_an_error_with_its_words(tmp_path: Path) -> None:
    path = tmp_path / "envoy.json"
    path.write_text('{"no_such_field": 1}')
    with pytest.raises(InvalidRequest, match="no_such_field"):
        validate(path)


def test_only_the_owner_reads_the_token(tmp_path: Path) -> None:
    path = install(settings(tmp_path))
    assert TOKEN in path.read_text()
    for written in path.parent.iterdir():
        assert written.stat().st_mode & 0o077 == 0, written
    assert path.parent.stat().st_mode & 0o077 == 0


def test_the_token_guards_the_admin_listener_only(tmp_path: Path) -> None:
    edge, admin = _listeners(tmp_path)
    assert TOKEN in json.dumps(admin)
    assert TOKEN not in json.dumps(edge)


def test_the_edge_knows_no_admin_service(tmp_path: Path) -> None:
    edge, _ = _listeners(tmp_path)
    text = json.dumps(edge)
    for name in (
        "AdminService",
        "RegistryService",
        "ArtifactService",
        "PushService",
        "VersionService",
        "SyncService",
        "RolloutService",
        "FollowService",
        "ProfileService",
        "KeyService",
        "SupervisorService",
        "FleetService",
        "StorageService",
        "control-admin",
    ):
        assert name not in text


def test_the_filters_stand_in_this_order(tmp_path: Path) -> None:
    names = [
        [entry["name"].rpartition(".")[2] for entry in _manager(one)["httpFilters"]] for one in _listeners(tmp_path)
    ]
    assert names == [
        [
            "lua",
            "lua",
            "health_check",
            "cors",
            "lift",
            "json_to_metadata",
            "grpc_json_transcoder",
            "express",
            "pick",
            "ext_proc",
            "router",
        ],
        ["rbac", "api_key_auth", "lua", "lua", "grpc_json_transcoder", "router"],
    ]


def test_every_cluster_of_the_mesh_demands_a_peer_and_shows_a_leaf(tmp_path: Path) -> None:
    config = edge_config(settings(tmp_path)).to_dict()
    wanted = {
        "replicas": ("edge", "worker"),
        "picker": ("edge", "proxy"),
        "control": ("edge", "proxy"),
        "control-admin": ("admin-edge", "proxy"),
        "registry": ("admin-edge", "registry"),
        "relay": ("edge", "relay"),
    }
    found = {}
    for cluster in config["staticResources"]["clusters"]:
        tls = cluster["transportSocket"]["typedConfig"]["commonTlsContext"]
        leaf = tls["tlsCertificateSdsSecretConfigs"][0]["sdsConfig"]["pathConfigSource"]["path"]
        sans = tls["combinedValidationContext"]["defaultValidationContext"]["matchTypedSubjectAltNames"]
        assert [san["sanType"] for san in sans] == ["URI"]
        assert tls["tlsParams"] == {"tlsMinimumProtocolVersion": "TLSv1_3", "tlsMaximumProtocolVersion": "TLSv1_3"}
        found[cluster["name"]] = (
            Path(leaf).name.removeprefix("sds-").removesuffix("-leaf.json"),
            sans[0]["matcher"]["exact"],
        )
    assert found == {
        name: (leaf, f"spiffe://helios.local/ns/default/sa/{peer}") for name, (leaf, peer) in wanted.items()
    }


def test_an_answer_may_take_any_time_while_it_says_something(tmp_path: Path) -> None:
    """Envoy's own default is 15 s a request, and other gateways have 60, 300 or 900."""
    for listener in _listeners(tmp_path):
        manager = _manager(listener)
        routes_of = [route for host in manager["routeConfig"]["virtualHosts"] for route in host["routes"]]
        timeouts = {route["route"]["timeout"] for route in routes_of if "route" in route}
        assert timeouts == {"0s"}, "0 is none"
        for name in ("idleTimeout", "maxStreamDuration", "perTryTimeout", "perTryIdleTimeout", "drainTimeout"):
            assert name not in json.dumps(listener), name
        assert manager["streamIdleTimeout"] == "4200s", "an hour, behind the longest hold"


def test_nothing_that_envoy_waits_for_is_waited_for_without_end(tmp_path: Path) -> None:
    edge, _ = (_manager(listener) for listener in _listeners(tmp_path))
    picker = next(one for one in edge["httpFilters"] if one["name"].endswith("ext_proc"))
    hold_seconds = settings(tmp_path).limits.hold_limit_seconds
    message_timeouts = re.findall(r'"messageTimeout": "(\d+s)"', json.dumps(picker))
    assert len(message_timeouts) == 1
    waits = (
        edge["requestHeadersTimeout"],
        edge["requestTimeout"],
        message_timeouts[0],
        edge["streamIdleTimeout"],
    )
    seconds = [float(wait.removesuffix("s")) for wait in waits]
    assert seconds == sorted(seconds)
    # The picker's own answer, which says when to come again, is sooner.
    assert ProxySettings().hold.limit_seconds < hold_seconds < seconds[2]
    for cluster in edge_config(settings(tmp_path)).to_dict()["staticResources"]["clusters"]:
        assert cluster["connectTimeout"] == "5s"
        (options,) = cluster["typedExtensionProtocolOptions"].values()
        keepalive = options["explicitHttpConfig"]["http2ProtocolOptions"]["connectionKeepalive"]
        assert set(keepalive) >= {"interval", "timeout"}, "a peer that is gone without a word is noticed"


def test_nothing_deprecated_is_used(tmp_path: Path) -> None:
    text = json.dumps(edge_config(settings(tmp_path)).to_dict())
    for name in ("inlineCode", "perRequestBufferLimitBytes", "asyncMode"):
        assert name not in text


def test_hot_restart_is_off(tmp_path: Path) -> None:
    line = command(tmp_path / "envoy.json")
    assert "--disable-hot-restart" in line
    assert line[0] == str(binary())
    assert binary().is_file()


@pytest.mark.parametrize(
    "text", ["", "127.0.0.1", "127.0.0.1:", "127.0.0.1:x", "127.0.0.1:99999", "unix:relative", "unix:/" + "a" * 110]
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        address(text)


NAMES = ("x-helios-model", "x-helios-durable")


def is_removed(name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in all_names_but("x-helios-", *NAMES))


@given(st.text("x-heliosmdapurb", max_size=20).map(lambda tail: "x-helios-" + tail) | st.sampled_from(NAMES))
def test_the_pattern_matches_every_name_but_some(name: str) -> None:
    assert is_removed(name) == (name not in NAMES)


@given(st.sampled_from(NAMES), st.integers(0, 20), st.text("modelxdurable", max_size=3))
def test_the_pattern_matches_near_misses(near: str, cut: int, tail: str) -> None:
    name = "x-helios-" + near.removeprefix("x-helios-")[:cut] + tail
    assert is_removed(name) == (name not in NAMES)


def test_paths_and_methods_come_from_the_contracts() -> None:
    assert rest.literal_paths(routes.EDGE_REST_SERVICES) == {
        "/v1/chat/completions": {"POST"},
        "/v1/completions": {"POST"},
        "/v1/embeddings": {"POST"},
        "/v1/models": {"GET"},
    }
    assert rest.literal_paths(routes.ADMIN_REST_SERVICES)["/admin/v1/models:ingest"] == {"POST"}


def test_every_service_that_is_named_exists() -> None:
    names = {f"{file.package}.{service.name}" for file in rest.descriptor_set().file for service in file.service}
    assert {*routes.EDGE_REST_SERVICES, *routes.ADMIN_REST_SERVICES, routes.INFERENCE_SERVICE} <= names


def _listeners(directory: Path) -> list[dict[str, Any]]:
    listeners: list[dict[str, Any]] = edge_config(settings(directory)).to_dict()["staticResources"]["listeners"]
    return listeners


def _manager(listener: dict[str, Any]) -> dict[str, Any]:
    manager: dict[str, Any] = listener["filterChains"][0]["filters"][0]["typedConfig"]
    return manager
