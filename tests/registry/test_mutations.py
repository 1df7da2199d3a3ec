"""What changes a model is carried out once however often it is asked for, and refused where the model has moved on.

Each operation is taken through both, on both databases; and every call of the contracts that changes a model has the
fields for it.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pytest
from google.api import annotations_pb2

from helios.api.registry.v1 import registry_service_pb2, version_service_pb2
from helios.mesh.errors import Conflict, InvalidRequest
from helios.registry.database import Database
from helios.registry.engine_settings import EngineSettings
from helios.registry.events import Mutation
from helios.registry.manifest import Digest, Entry, Manifest
from helios.registry.names import parse_reference
from helios.registry.policy import ModelPolicy
from helios.registry.profile import ModelProfile
from helios.registry.store import NewRevision, Store
from helios.registry.tag_store import TagStore

NOW = datetime(2026, 1, 1, tzinfo=UTC)
PROFILE = ModelProfile("LlamaForCausalLM", 1, 2, "float16", 4, 64, 2, 8)
MEDIA = "application/vnd.cncf.model.weight.v1.raw"


def revision(seed: str) -> NewRevision:
    return NewRevision(Manifest.of([Entry("w", Digest(seed * 64, 1), MEDIA)]), PROFILE, f"dir:/{seed}")


A, B, C = (revision(seed).manifest.digest() for seed in "abc")


@dataclass(frozen=True)
class Stores:
    """The operations that change models."""

    models: Store
    tags: TagStore


Change = Callable[[Stores, Mutation], Awaitable[object]]
CHANGES: dict[str, Change] = {
    "put_model": lambda to, how: to.models.put_model("m", ("y",), revision("d"), NOW, how),
    "delete_model": lambda to, how: to.models.delete_model("m", NOW, how, is_forced=True),
    "put_alias": lambda to, how: to.models.put_alias("y", "m", NOW, how),
    "delete_alias": lambda to, how: to.models.delete_alias("x", NOW, how),
    "update_policy": lambda to, how: to.models.update_policy("m", ModelPolicy(1, 2), NOW, how),
    "update_engine_settings": lambda to, how: to.models.update_engine_settings(
        "m", EngineSettings('{"max_context_tokens": 64}'), NOW, how
    ),
    "put_tag": lambda to, how: to.tags.put_tag(parse_reference(f"m@{A}"), "canary", NOW, how),
    "delete_tag": lambda to, how: to.tags.delete_tag("m", "prod", NOW, how),
    "roll_back": lambda to, how: to.tags.roll_back("m", "", NOW, how),
    "put_pin": lambda to, how: to.tags.put_pin(parse_reference(f"m@{B}"), "audit", NOW, how),
    "delete_pin": lambda to, how: to.tags.delete_pin(parse_reference(f"m@{C}"), NOW, how),
    "delete_revision": lambda to, how: to.tags.delete_revision(parse_reference(f"m@{B}"), NOW, how),
}


@pytest.fixture
async def stores(database: Database) -> Stores:
    """A model with three revisions, an alias, a tag and a pin."""
    models = Store(database)
    stores = Stores(models, TagStore(database, models.changes))
    for seed in "abc":
        await models.put_model("m", ("x",), revision(seed), NOW)
    await stores.tags.put_tag(parse_reference(f"m@{A}"), "prod", NOW)
    await stores.tags.put_pin(parse_reference(f"m@{C}"), "", NOW)
    return stores


@pytest.mark.parametrize("name", CHANGES)
async def test_is_carried_out_once_and_told(name: str, stores: Stores) -> None:
    change, changes = CHANGES[name], stores.models.changes
    before = await changes.version()
    once = Mutation("somebody", "r-1", (await stores.models.get_model("m")).version)
    await change(stores, once)
    after = await changes.version()
    told = await changes.list_events(after=before, limit=100)
    assert told, "nobody is told"
    assert {event.actor for event in told} == {"somebody"}
    assert [event.version for event in told] == list(range(before + 1, after + 1))
    await change(stores, once)
    assert await changes.version() == after
    with pytest.raises(InvalidRequest) as caught:
        await change(stores, Mutation("somebody", "r-1", once.expected_version + 1))
    assert caught.value.reason == "REQUEST_ID_REUSED"


@pytest.mark.parametrize("name", CHANGES)
async def test_is_refused_where_the_model_has_moved_on(name: str, stores: Stores) -> None:
    seen = (await stores.models.get_model("m")).version
    await stores.models.update_policy("m", ModelPolicy(3, 3), NOW)
    before = await stores.models.changes.version()
    with pytest.raises(Conflict) as caught:
        await CHANGES[name](stores, Mutation(expected_version=seen))
    assert caught.value.reason == "STALE_VERSION"
    assert await stores.models.changes.version() == before


async def test_an_ingest_that_is_sent_again_does_not_undo_a_rollback(stores: Stores) -> None:
    once = Mutation("", "r-1")
    await stores.models.put_model("m", (), revision("d"), NOW, once)
    await stores.tags.roll_back("m", "", NOW)
    assert (await stores.models.put_model("m", (), revision("d"), NOW, once)).revision.digest == C
    assert (await stores.models.put_model("m", (), revision("d"), NOW)).revision != C


# What changes no model, or nothing that another caller may have changed meanwhile.
UNVERSIONED = {"CollectBlobs"}


@pytest.mark.parametrize(
    "service",
    [
        registry_service_pb2.DESCRIPTOR.services_by_name["RegistryService"],
        version_service_pb2.DESCRIPTOR.services_by_name["VersionService"],
    ],
    ids=lambda service: service.name,
)
def test_every_call_that_changes_a_model_says_which_one_it_is_and_what_it_has_seen(service: Any) -> None:
    changing = [
        method
        for method in service.methods
        if method.name not in UNVERSIONED
        and method.GetOptions().Extensions[annotations_pb2.http].WhichOneof("pattern") not in (None, "get")
    ]
    assert len(changing) >= 6
    for method in changing:
        fields = set(method.input_type.fields_by_name)
        assert {"request_id", "expected_version"} <= fields, method.name
        # What an ingest would make is not known before it has fetched it.
        assert method.name == "IngestModel" or "dry_run" in fields, method.name
