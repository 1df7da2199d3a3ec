"""Tags and digests in requests: which entry a reference means; what a proxy hears from a real registry and tells it."""

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from helios.mesh.errors import HeliosError, InvalidRequest, ModelNotFound, NotFound, RevisionNotFound, Unavailable
from helios.proxy.catalog.addressed import entries_of
from helios.proxy.catalog.servicer import find_model
from helios.proxy.catalog.session import RegistryClients, RegistrySession
from helios.proxy.catalogue import ModelEntry, addressed_name, is_by_digest
from helios.proxy.core import Core
from helios.registry.client import EngineSettings, Model, ModelPolicy, RegistryClient, ResolvedModel, VersionClient
from helios.registry.names import Reference, parse_reference
from tests.proxy.support import core, entry
from tests.registry.support import Mesh, Parts, open_parts, serve
from tests.registry.test_store import A, B, C, new

OTHER = f"m@{A[7:19]}"


@dataclass
class Runtime:
    """Lets a session change a core, and sends nothing."""

    core: Core

    def apply(self, _: Iterable[object]) -> None: ...


class NoStore:
    def mark_changed(self) -> None: ...


@dataclass
class World:
    """A real registry, and a core that a session feeds from it."""

    parts: Parts
    session: RegistrySession
    core: Core

    def found(self, name: str) -> ModelEntry | None:
        return self.core.catalogue.find(name)

    async def until(self, holds: Callable[[], Any]) -> None:
        async with asyncio.timeout(20):
            while not holds():
                await asyncio.sleep(0.01)

    async def follows(self) -> None:
        """Waits until a change that is made now has arrived."""
        name = f"mark{len(self.core.catalogue)}"
        await self.parts.catalog.put_model(name, (), new("f"))
        await self.until(lambda: self.found(name))


@pytest.fixture
async def world(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    mesh = Mesh(tmp_path_factory.mktemp("pki"))
    async with open_parts(tmp_path / "registry") as parts, serve(parts, mesh) as address:
        for seed in "ab":
            await parts.catalog.put_model("m", ("x",), new(seed))
        async with mesh.dialer(address, "proxy") as dialer:
            registry = RegistryClient(dialer)
            subject = core()
            clients = RegistryClients(registry, registry, VersionClient(dialer))
            session = RegistrySession(clients, Runtime(subject), NoStore())  # type: ignore[arg-type]
            async with watching(session):
                world = World(parts, session, subject)
                await world.until(lambda: subject.catalogue.is_synced)
                yield world


@asynccontextmanager
async def watching(session: RegistrySession) -> AsyncIterator[None]:
    async with asyncio.TaskGroup() as group:
        task = group.create_task(session.watch(), name="watch")
        yield
        task.cancel()


async def test_a_tag_is_found_once_the_watch_told_it_and_moves_at_once(world: World) -> None:
    versions = world.parts.versions
    with pytest.raises(ModelNotFound):
        world.core.resolve("m@prod")
    await versions.put_tag(parse_reference("m"), "prod")
    await world.until(lambda: world.found("m@prod"))
    # What is served has one entry, whatever it is called.
    assert world.found("m@prod") == world.found("x@prod") == world.found("m")
    await versions.put_tag(Reference("m", digest=A), "prod")
    await world.until(lambda: world.found(OTHER))
    assert world.found("m@prod") == world.found("x@prod") == world.found(OTHER)
    assert (world.found("m@prod") or entry()).revision == A
    assert (world.found("m") or entry()).revision == B
    await versions.delete_tag("m", "prod")
    await world.follows()
    assert world.found("m@prod") is None
    assert world.found(OTHER) is None
    with pytest.raises(ModelNotFound):
        world.core.resolve("m@prod")


async def test_a_digest_is_asked_for_and_stays_as_long_as_its_revision(world: World) -> None:
    reference = f"m@{A[7:15]}"
    assert world.core.resolve(reference) is None
    found = await world.session.find(reference)
    assert (found.name, found.revision, found.aliases) == (OTHER, A, (reference,))
    world.core.model_upserted(found, 0.0)
    assert world.core.resolve(reference) == found
    # A change of the model leaves it; another spelling joins it.
    await world.parts.catalog.update_policy("m", ModelPolicy(1, 2))
    await world.follows()
    kept = world.found(reference)
    assert kept is not None
    assert (kept.name, kept.min_replicas, kept.max_replicas) == (OTHER, 0, 2)
    again = await world.session.find(f"x@{A}")
    assert again.aliases == (reference, f"x@{A}")
    await world.parts.versions.delete_revision(Reference("m", digest=A))
    await world.follows()
    assert world.found(OTHER) is None
    with pytest.raises(RevisionNotFound):
        await world.session.find(reference)


async def test_a_digest_of_what_is_served_is_the_model_itself(world: World) -> None:
    found = await world.session.find(f"m@{B}")
    assert (found.name, found.revision) == ("m", B)
    assert found.aliases == ("x", f"m@{B}")


async def test_an_answer_that_is_older_than_the_watch_moves_no_tag_back(world: World) -> None:
    await world.parts.versions.put_tag(Reference("m", digest=A), "prod")
    await world.until(lambda: world.found(OTHER))
    clients, asked = world.session._clients, []

    class Late:
        async def resolve(self, name: str) -> ResolvedModel:
            found = await clients.versions.resolve(name)
            asked.append(name)
            if len(asked) == 1:
                await world.parts.versions.put_tag(Reference("m", digest=B), "prod")
                await world.until(lambda: (world.found("m@prod") or entry()).revision == B)
            return found

    world.session._clients = replace(clients, versions=Late())  # type: ignore[arg-type]
    world.core.model_upserted(await world.session.find(f"m@{A[7:15]}"), 0.0)
    assert (world.found("m@prod") or entry()).revision == B
    assert (world.found(f"m@{A[7:15]}") or entry()).revision == A


async def test_a_scale_waits_for_the_registry_and_keeps_what_others_change_meanwhile(world: World) -> None:
    catalog, clients, asked = world.parts.catalog, world.session._clients, []

    class Shaky(RegistryClient):
        async def get_model(self, name: str) -> Model:
            asked.append(name)
            if len(asked) == 1:
                raise Unavailable("failed to connect")
            found = await super().get_model(name)
            if len(asked) == 2:
                await catalog.update_policy("m", replace(found.policy, max_replicas=8, idle_seconds=77))
            return found

    world.session._clients = replace(clients, steady=Shaky(clients.steady._dialer))
    entry = await world.session.set_count("m", 2)
    assert (entry.min_replicas, entry.max_replicas, len(asked)) == (2, 8, 3)
    assert (await clients.steady.get_model("m")).policy == ModelPolicy(2, 8, idle_seconds=77)
    with pytest.raises(ModelNotFound):
        await world.session.set_count("nobody", 2)
    assert len(asked) == 4


@pytest.mark.parametrize(
    ("most", "count", "expected"), [(0, 5, (5, 0)), (3, 2, (2, 3)), (3, 5, (5, 5)), (3, 0, (0, 3)), (1, 1, (1, 1))]
)
async def test_a_scale_moves_the_upper_bound_only_where_it_is_in_the_way(
    world: World, most: int, count: int, expected: tuple[int, int]
) -> None:
    await world.parts.catalog.update_policy("m", ModelPolicy(0, most))
    await world.session.set_count("m", count)
    policy = (await world.session._clients.steady.get_model("m")).policy
    assert (policy.min_replicas, policy.max_replicas) == expected


@pytest.mark.parametrize(
    ("name", "expected", "words"),
    [
        ("m@", InvalidRequest, "'' is not a tag"),
        ("m@no such", InvalidRequest, "no such"),
        ("nobody@sha256:12345678", ModelNotFound, "nobody"),
        ("m@000000000000", RevisionNotFound, "sha256:000000000000"),
    ],
)
async def test_what_the_registry_says_of_a_name_is_told_as_it_is(
    world: World, name: str, expected: type[HeliosError], words: str
) -> None:
    runtime: Any = Runtime(world.core)
    world.core.catalogue.is_synced = False
    with pytest.raises(expected, match=re.escape(words)):
        await find_model(runtime, world.session, name)


async def test_of_a_registry_that_is_away_a_name_says_so(world: World) -> None:
    class Away(RegistryClient):
        async def get_model(self, name: str) -> Model:
            raise Unavailable("failed to connect")

    clients = world.session._clients
    world.session._clients = replace(clients, quick=Away(clients.quick._dialer))
    runtime: Any = Runtime(world.core)
    world.core.catalogue.is_synced = False
    with pytest.raises(Unavailable, match=r"registry can't be asked \(failed to connect\)") as refused:
        await find_model(runtime, world.session, "somebody")
    assert (refused.value.reason, refused.value.retry_after_seconds) == ("REGISTRY_UNAVAILABLE", 2)


async def test_a_model_that_went_while_it_was_asked_for_stays_away(world: World) -> None:
    clients, asked = world.session._clients, []

    class Late:
        async def resolve(self, name: str) -> ResolvedModel:
            found = await clients.versions.resolve(name)
            asked.append(name)
            await world.parts.catalog.delete_model("m")
            await world.until(lambda: world.found("m") is None)
            return found

    world.session._clients = replace(clients, versions=Late())  # type: ignore[arg-type]
    with pytest.raises(ModelNotFound):
        await world.session.find(f"m@{A[7:15]}")


async def test_what_can_not_be_is_not_asked_for(world: World) -> None:
    for name in (f"other@{A}", "m@prod", "m@", "m@sha256:", "m@abc", "m@XYZXYZ"):
        with pytest.raises(ModelNotFound):
            world.core.resolve(name)
    with pytest.raises(NotFound):
        await world.session.find("m@000000")


async def test_a_model_that_goes_takes_its_revisions_along(world: World) -> None:
    await world.parts.versions.put_tag(Reference("m", digest=A), "prod")
    await world.until(lambda: world.found("m@prod"))
    await world.parts.catalog.delete_model("m")
    await world.follows()
    assert [one.name for one in world.core.catalogue.models() if one.name.startswith("m@") or one.name == "m"] == []


async def test_a_watch_that_breaks_forgets_no_reference(world: World) -> None:
    world.core.model_upserted(await world.session.find(f"m@{A[7:15]}"), 0.0)
    await world.parts.versions.put_tag(Reference("m", digest=A), "prod")
    await world.until(lambda: world.found("m@prod"))
    world.core.models_replaced([], 0.0, is_synced=False)
    async with watching(world.session):
        await world.until(lambda: world.found("m@prod"))
        assert world.found(f"m@{A[7:15]}") == world.found("m@prod")


async def test_other_revisions_have_no_adapters(world: World) -> None:
    """A name of an adapter means one thing: the adapter beside what its model serves."""
    await world.parts.catalog.put_model("adapter", (), new("d"))
    settings = '{"lora": {"adapters": [{"model": "adapter", "name": "fine"}], "max_rank": 8}}'
    await world.parts.catalog.update_engine_settings("m", EngineSettings(settings))
    await world.parts.versions.put_tag(Reference("m", digest=A), "prod")
    model = await world.parts.store.get_model("m")
    own, other = entries_of(model, {})
    assert (own.adapters, other.adapters) == (("fine",), ())
    assert '"max_rank": 8' in other.engine_settings


@pytest.mark.parametrize(
    ("name", "expected"),
    [(f"m@{A}", True), ("a/b@0123ab", True), ("m@sha256:0123ab", True), ("m@prod", False), ("m@0123a", False),
     ("0123ab", False), ("m@0123AB", False), (f"m@{A}0", False)],
)  # fmt: skip
def test_what_reads_like_a_digest(name: str, expected: bool) -> None:
    assert is_by_digest(name) == expected


def test_an_entry_of_another_revision_is_named_by_its_digest() -> None:
    assert addressed_name("org/m", C) == f"org/m@{C[7:19]}"
