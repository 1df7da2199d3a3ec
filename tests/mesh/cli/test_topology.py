"""Overrides of settings that make no sense are refused with a message, before anything starts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from helios.cli import topology
from helios.cli.certificates import issue_due
from helios.cli.state import StateDirectory
from helios.cli.up import STOP_ORDER, Mesh, UpOptions
from helios.mesh.errors import InvalidRequest
from helios.mesh.settings import load_settings, to_arguments
from helios.proxy.settings import ProxySettings
from helios.worker.settings import ReplicaSettings


@pytest.mark.parametrize(
    "override",
    [
        "proxy",
        "proxy.x",
        "nobody.x=1",
        "proxy.listen.deeper=1",
        "proxy.hold=5",
        "proxy.hold.limit_seconds=soon",
        "worker.replica.drain_seconds=soon",
    ],
)
def test_overrides_that_make_no_sense_are_refused(tmp_path: Path, override: str) -> None:
    state = StateDirectory(tmp_path)
    state.create()
    issue_due(state)
    options = UpOptions(state, overrides=("proxy.listen=1", override))
    with pytest.raises(InvalidRequest, match="--set"):
        topology.children(state, topology.settings_of(options), options)


@pytest.mark.parametrize(
    ("host", "override", "is_required"),
    [
        ("127.0.0.1", "", False),
        ("[::1]", "", False),
        ("0.0.0.0", "", True),
        ("[::]", "", True),
        ("192.0.2.7", "", True),
        ("0.0.0.0", "proxy.admission.require_keys=false", False),
        ("127.0.0.1", "proxy.admission.require_keys=true", True),
    ],
)
def test_addresses_that_others_reach_need_keys(tmp_path: Path, host: str, override: str, *, is_required: bool) -> None:
    options = UpOptions(StateDirectory(tmp_path), host=host, overrides=(override,) if override else ())
    settings = topology.settings_of(options)
    assert topology.requires_keys(settings) is is_required
    # The proxy reads it so, too.
    read = load_settings(ProxySettings, to_arguments(settings["proxy"]))
    assert read.admission.require_keys is is_required


@pytest.mark.parametrize(("overrides", "seconds"), [((), 105), (("worker.replica.drain_seconds=100",), 175)])
def test_a_mesh_says_how_long_its_stop_may_take(tmp_path: Path, overrides: tuple[str, ...], seconds: int) -> None:
    state = StateDirectory(tmp_path)
    state.create()
    issue_due(state)
    mesh = Mesh(UpOptions(state, overrides=overrides), lambda _: None)
    worker = next(child.spec for child in mesh.children if child.spec.name == "worker")
    assert worker.stop_seconds > ReplicaSettings().drain_seconds
    assert mesh.stop_seconds == seconds


def test_several_proxies_have_what_is_their_own_and_share_the_rest(tmp_path: Path) -> None:
    state = StateDirectory(tmp_path)
    state.create()
    issue_due(state)
    options = UpOptions(state, proxies=3, overrides=("proxy.idle_timeout_seconds=7",))
    settings = topology.settings_of(options)
    specs = {spec.name: spec for spec in topology.children(state, settings, options)}
    assert list(specs) == ["registry", "storage", "proxy", "proxy-2", "proxy-3", "relay", "worker", "envoy"]
    read = [load_settings(ProxySettings, list(specs[name].arguments[4:])) for name in ("proxy", "proxy-2", "proxy-3")]
    for name in ("proxy_id", "state_directory", "control_listen", "picker_listen", "replica_cluster"):
        assert len({getattr(proxy, name) for proxy in read}) == 3, name
    assert {(proxy.idle_timeout_seconds, proxy.peers.lease) for proxy in read} == {(7.0, True)}
    # Envoy has no stream for the express lane where each proxy has one of its own.
    assert {proxy.core_policy().routing.express.model_count for proxy in read} == {0}
    assert settings["worker"]["proxies"] == [proxy.control_listen for proxy in read]
    envoy = json.loads((tmp_path / "envoy" / "envoy.json").read_text())
    clusters = {cluster["name"] for cluster in envoy["staticResources"]["clusters"]}
    assert {proxy.replica_cluster for proxy in read} <= clusters
    # A directory that had three is one of its own.
    (state.run / "lock").unlink(missing_ok=True)
    state.create()


def test_picker_processes_hear_workers_through_their_proxy(tmp_path: Path) -> None:
    state = StateDirectory(tmp_path)
    state.create()
    issue_due(state)
    options = UpOptions(state, proxies=2, overrides=("proxy.pickers=2",))
    settings = topology.settings_of(options)
    specs = {spec.name: spec for spec in topology.children(state, settings, options)}
    names = ["proxy", "proxy-2", "proxy-3", "proxy-4"]
    read = [load_settings(ProxySettings, list(specs[name].arguments[4:])) for name in names]
    first, second, *pickers = read
    assert [picker.feed_target for picker in pickers] == [first.control_listen, second.control_listen]
    assert settings["worker"]["proxies"] == [first.control_listen, second.control_listen]
    assert len({proxy.picker_listen for proxy in read}) == 4
    (state.run / "lock").unlink(missing_ok=True)
    for wrong in ("0", "9", "many"):
        with pytest.raises(InvalidRequest):
            topology.children(state, settings | {"proxy": settings["proxy"] | {"pickers": wrong}}, options)


def test_all_processes_of_several_proxies_are_stopped_in_order(tmp_path: Path) -> None:
    state = StateDirectory(tmp_path)
    state.create()
    issue_due(state)
    mesh = Mesh(UpOptions(state, proxies=2), lambda _: None)
    stopped = [child.spec.name for names in STOP_ORDER for child in mesh.children_of(names)]
    assert stopped == ["envoy", "relay", "worker", "proxy", "proxy-2", "registry", "storage"]


def test_commands_do_not_wait_for_envoys_types() -> None:
    code = "import sys, helios.cli.main; sys.exit('envoy_data_plane' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
