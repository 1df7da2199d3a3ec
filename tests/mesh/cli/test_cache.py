"""`helios cache` against a real storage agent on its socket; only the mesh around it is missing."""

import io
import json
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from helios.cli import cache
from helios.cli.state import MeshRecord, StateDirectory, process_started_at, write_mesh
from helios.mesh.errors import Corrupted, PreconditionFailed
from helios.mesh.identity import CertificateAuthority
from tests.storage.harness import Agent, Mesh, digest_of, make_shelf, serve_registry
from tests.storage.test_moves import flip

CONTENT = os.urandom(1 << 20)


@dataclass
class Node:
    """A state directory with an agent, what it has, and what commands print."""

    state: StateDirectory
    agent: Agent
    revision: str
    screen: io.StringIO
    console: Console

    def printed(self) -> Any:
        text = self.screen.getvalue()
        self.screen.truncate(0)
        self.screen.seek(0)
        return json.loads(text)


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    state = StateDirectory(tmp_path / "state")
    state.create()
    authority = CertificateAuthority.open(state.pki)
    authority.issue("admin-edge", state.pki / "admin-edge")
    # Nobody listens at the admin address: names of models are left out then.
    (state.root / "admin-token").write_text("token")
    started_at = process_started_at(os.getpid())
    assert started_at is not None
    record = MeshRecord(pid=os.getpid(), started_at=started_at, state="ready", edge="", admin="127.0.0.1:1")
    write_mesh(state, record)
    shelf = make_shelf(tmp_path / "registry" / "blobs")
    async with serve_registry(shelf, authority.issue("registry", tmp_path / "pki" / "registry")) as address:
        mesh = Mesh(tmp_path, authority, shelf, address)
        listen = f"unix:{state.sockets / 'storage.sock'}"
        async with mesh.agent(listen=listen, is_link_allowed=False) as agent:
            revision = shelf.add({"w": CONTENT})
            async with agent.client.materialize(revision, holder="t"):
                pass
            screen = io.StringIO()
            yield Node(state, agent, revision, screen, Console(file=screen, width=200))


async def test_status_shows_tiers_and_revisions(node: Node) -> None:
    await cache.status(node.state, node.console, is_json=True)
    printed = node.printed()
    assert printed["miss_count"] == 1
    assert printed["tiers"][0]["tier"] == {"name": "disk", "used_bytes": 1 << 20, "capacity_bytes": 0, "kind": "ssd"}
    assert printed["revisions"][0]["revision"] == node.revision
    await cache.status(node.state, node.console, is_json=False)
    text = node.screen.getvalue()
    assert node.revision[:19] in text
    assert "0 of 1" in text


async def test_a_pinned_revision_is_not_evicted_until_it_is_unpinned(node: Node) -> None:
    await cache.pin(node.state, node.console, node.revision, is_pinned=True, is_json=True)
    assert node.printed() == {"revision": node.revision, "pinned": True}
    with pytest.raises(PreconditionFailed, match="pinned"):
        await cache.evict(node.state, node.console, node.revision, is_json=True)
    await cache.pin(node.state, node.console, node.revision, is_pinned=False, is_json=False)
    node.screen.truncate(0)
    node.screen.seek(0)
    await cache.evict(node.state, node.console, node.revision, is_json=True)
    assert node.printed() == {"revision": node.revision, "freed_bytes": 1 << 20}


async def test_a_scrub_fails_where_something_was_bad_and_says_what_became_of_it(node: Node) -> None:
    await cache.scrub(node.state, node.console, bytes_per_second=None, is_json=True)
    assert node.printed() == {"done_bytes": 1 << 20, "total_bytes": 1 << 20, "corrupt": []}
    flip(node.agent.materializer.rooms[0].tier.store.blob_path(digest_of(CONTENT).hash))
    with pytest.raises(Corrupted) as raised:
        await cache.scrub(node.state, node.console, bytes_per_second=None, is_json=False)
    assert raised.value.reason == "BLOBS_CORRUPT"
    assert f"{digest_of(CONTENT).hash} in disk: gone; it is fetched again" in node.screen.getvalue()
