"""Usage: what is reported adds up once, whatever is sent again; forecasts are made once, scored, and told."""

import asyncio
import threading
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy.ext.asyncio import AsyncConnection

from helios.api.registry.v1 import usage_service_pb2 as pb
from helios.api.registry.v1.usage_service_pb2_grpc import add_UsageServiceServicer_to_server
from helios.mesh.channel import Dialer
from helios.mesh.errors import Bug, Draining, InvalidRequest, ModelNotFound, PermissionDenied
from helios.mesh.server import MeshServer, ServerOptions
from helios.registry import access
from helios.registry.client import Counts, Delta, Expectation, Forecast, Rung, UsageClient, hour_of, start_of
from helios.registry.database import Database
from helios.registry.store import Store
from helios.registry.usage import forecast_run
from helios.registry.usage import store as usage_store
from helios.registry.usage import usage as usage_module
from helios.registry.usage.answers import ModelUsage
from helios.registry.usage.records import UsageHour
from helios.registry.usage.score import Score, score_of
from helios.registry.usage.servicer import UsageServicer
from helios.registry.usage.settings import UsageSettings
from helios.registry.usage.store import UsageStore
from helios.registry.usage.usage import Usage, run_process
from tests.registry.stores import Place, Templates, opened
from tests.registry.support import Mesh
from tests.registry.test_store import SHARED, new

NOW = datetime(2026, 3, 2, 10, 5, tzinfo=UTC)
HOUR = hour_of(NOW)
ONE = Counts(1, 10, 5, 1, 200)


@pytest.fixture
async def store(database: Database) -> UsageStore:
    models = Store(database)
    for name, seed in (("a", "a"), ("b", "b"), ("twin", "a")):
        await models.put_model(name, (), new(seed), NOW)
    return UsageStore(database)


async def report(store: UsageStore, reporter: str, sequence: int, *deltas: Delta) -> int:
    return await store.report(reporter, sequence, deltas, now=NOW)


async def requests(store: UsageStore, since: int = HOUR - 9) -> dict[tuple[str, int], int]:
    found = await store.hours(["a", "b", "twin", "gone"], since)
    return {(model, hour.hour): hour.counts.requests for model, hours in found.items() for hour in hours}


async def test_reports_add_up_and_one_that_is_sent_again_counts_once(store: UsageStore) -> None:
    assert await report(store, "p1", 1, Delta("a", HOUR, ONE), Delta("b", HOUR, Counts(3))) == 1
    assert await report(store, "p1", 1, Delta("a", HOUR, ONE), Delta("b", HOUR, Counts(3))) == 1
    assert await report(store, "p1", 2, Delta("a", HOUR, ONE), Delta("a", HOUR + 1, ONE)) == 2
    assert await report(store, "p1", 1, Delta("a", HOUR, Counts(99))) == 2, "an old number changes nothing"
    assert await report(store, "p2", 1, Delta("a", HOUR, ONE)) == 1, "another proxy's counts are added"
    found = await store.hours(["a"], HOUR)
    assert [hour.counts for hour in found["a"]] == [Counts(3, 30, 15, 3, 600), ONE]
    assert await requests(store) == {("a", HOUR): 3, ("a", HOUR + 1): 1, ("b", HOUR): 3}


async def test_usage_of_no_model_is_dropped_and_that_of_a_deleted_one_goes(
    store: UsageStore, database: Database
) -> None:
    assert await report(store, "p", 1, Delta("gone", HOUR, ONE), Delta("a", HOUR, ONE)) == 1
    assert await requests(store) == {("a", HOUR): 1}
    await Store(database).delete_model("a", NOW, is_forced=True)
    assert await requests(store) == {}


async def test_proxies_that_report_at_once_lose_nothing(place: Place) -> None:
    async with opened(place) as database:
        await Store(database).put_model("a", (), new("a"), NOW)
        async with asyncio.TaskGroup() as group:
            for reporter in range(8):
                for _ in range(2):
                    group.create_task(report(UsageStore(database), f"p{reporter}", 1, Delta("a", HOUR, ONE)))
    async with opened(place) as database:
        assert await requests(UsageStore(database)) == {("a", HOUR): 8}


Step = tuple[int, int, bool]


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 50), st.booleans()), max_size=12))
@settings(deadline=None, max_examples=15)
def test_a_report_whose_answer_was_lost_counts_once_in_any_order(
    templates: Templates, tmp_path_factory: pytest.TempPathFactory, steps: list[Step]
) -> None:
    async def play() -> None:
        with templates.place("sqlite", tmp_path_factory.mktemp("usage"), is_empty=False) as place:
            async with opened(place) as database:
                await Store(database).put_model("a", (), new("a"), NOW)
                store, sent = UsageStore(database), dict.fromkeys(range(3), 0)
                for reporter, count, is_lost in steps:
                    sent[reporter] += 1
                    for _ in range(2 if is_lost else 1):
                        await report(store, str(reporter), sent[reporter], Delta("a", HOUR, Counts(count)))
            async with opened(place) as database:
                total = sum((await requests(UsageStore(database))).values())
                assert total == sum(count for _, count, _ in steps)

    asyncio.run(play())


async def test_blobs_are_as_hot_as_all_models_that_share_them(store: UsageStore) -> None:
    await report(store, "p", 1, Delta("a", HOUR, Counts(5)), Delta("twin", HOUR, Counts(2)))
    await report(store, "p", 2, Delta("b", HOUR, Counts(4)), Delta("b", HOUR - 30, Counts(90)))
    heat = await store.heat(HOUR - 23, 10)
    assert [(blob.hash, blob.requests, blob.model_count) for blob in heat] == [
        (SHARED.hash, 11, 3),
        ("a" * 64, 7, 2),
        ("b" * 64, 4, 1),
    ]
    assert [blob.hash for blob in await store.heat(HOUR - 23, 1)] == [SHARED.hash]


async def test_histories_have_no_gaps_and_begin_with_the_first_use(store: UsageStore) -> None:
    await report(store, "p", 1, Delta("a", HOUR - 5, Counts(2)), Delta("a", HOUR - 2, Counts(7)))
    await report(store, "p", 2, Delta("a", HOUR, Counts(50)), Delta("b", HOUR, ONE))
    batches = [batch async for batch in store.histories(HOUR - 100, HOUR)]
    assert batches == [{"a": [2, 0, 0, 7, 0]}], "what began with the hour that runs says nothing yet"


async def test_of_several_registries_one_makes_the_forecasts_of_an_hour(store: UsageStore) -> None:
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(store.claim_run(HOUR)) for _ in range(5)]
    assert sorted(task.result() for task in tasks) == [False] * 4 + [True]
    assert not await store.claim_run(HOUR - 1)
    assert await store.claim_run(HOUR + 1)
    assert await store.last_run() == HOUR + 1


async def test_a_forecast_is_kept_beside_what_comes_and_replaced_by_the_next(store: UsageStore) -> None:
    forecast = Forecast("daily", 99, HOUR, (Expectation(3, 1, 6), Expectation(4, 2, 8)), NOW)
    await report(store, "p", 1, Delta("a", HOUR, Counts(2)))
    await store.save_forecasts({"a": forecast, "gone": forecast, "b": replace(forecast, hours=(Expectation(0, 0, 0),))})
    assert await store.forecasts(["a"]) == {"a": forecast}
    await report(store, "p", 2, Delta("a", HOUR, Counts(1)))
    (hour,) = (await store.hours(["a"], HOUR))["a"]
    assert (hour.counts.requests, hour.expectation) == (3, Expectation(3, 1, 6))
    assert "b" not in await store.hours(["b"], HOUR), "an hour of nothing, of which nothing is expected, has no row"
    later = replace(forecast, method="level", first_hour=HOUR + 1)
    await store.save_forecasts({"a": later})
    assert (await store.forecasts())["a"] == later


async def test_what_is_older_than_its_time_goes(store: UsageStore) -> None:
    await report(store, "p", 1, Delta("a", HOUR - 50, ONE), Delta("a", HOUR, ONE), Delta("b", HOUR - 50, ONE))
    forecast = Forecast("last", 1, HOUR, (Expectation(1, 0, 2),), NOW)
    await store.save_forecasts({"a": forecast, "b": replace(forecast, hours=(Expectation(0, 0, 0),))})
    assert await store.prune(HOUR - 24, now=NOW + timedelta(days=1)) == 2
    assert await requests(store, 0) == {("a", HOUR): 1}
    assert set(await store.forecasts()) == {"a"}, "of what was not used in all that time nothing is expected"
    assert await report(store, "p", 1, Delta("a", HOUR, ONE)) == 1, "its reporter is known still"
    await store.prune(0, now=NOW + timedelta(days=8))
    await report(store, "p", 1, Delta("a", HOUR, ONE))
    assert await requests(store, 0) == {("a", HOUR): 2}, "after a week of silence it is not"


async def test_forecasts_are_made_of_the_hours_before_and_scored_as_hours_pass(
    store: UsageStore, database: Database
) -> None:
    past = [Delta("a", HOUR - back, Counts(10, busy_ms=100_000)) for back in range(1, 60)]
    await report(store, "p", 1, *past, Delta("a", HOUR, Counts(500)))
    assert await forecast_run.run(database, since=HOUR - 1000, hour=HOUR) == 1
    usage = Usage(store, UsageSettings(), database="", now=lambda: NOW)
    (seen,) = await usage.of(["a"], 24)
    assert seen.forecast is not None
    assert seen.forecast.history_hours == 59
    assert seen.forecast.hours[0].requests == pytest.approx(10, abs=0.1)
    assert seen.score is None, "the hour runs still"
    assert seen.target is not None
    assert (seen.target.rung, seen.target.replica_count) == (Rung.READY, 1)
    later = Usage(store, UsageSettings(), database="", now=lambda: NOW + timedelta(hours=1))
    (seen,) = await later.of(["a"], 2)
    assert seen.counts.requests == 500
    assert seen.score is not None
    assert seen.score.wmape == pytest.approx(490 / 500, abs=0.01)
    assert seen.score.covered_ratio == 0
    assert await later.targets() == [seen.target]


@pytest.mark.slow
async def test_a_process_that_can_not_forecast_is_an_error_and_gone(tmp_path: Path) -> None:
    with pytest.raises(Bug):
        await run_process({"database": str(tmp_path), "since": 0, "hour": HOUR}, {}, timeout_seconds=120)


async def test_the_process_that_forecasts_has_what_libpq_reads_and_no_other_secrets() -> None:
    environment = {"PGPASSWORD": "a", "PGSSLROOTCERT": "b", "HOME": "c", "AWS_SECRET_ACCESS_KEY": "d"}
    job: dict[str, str | int] = {"names": " ".join(environment)}
    module = "tests.registry.environment_told"
    assert await run_process(job, environment, timeout_seconds=120, module=module) == 3


async def test_another_registrys_forecasts_are_told_of_when_they_are_there(
    store: UsageStore, database: Database
) -> None:
    await report(store, "p", 1, *(Delta("a", HOUR - back, Counts(10)) for back in range(1, 30)))
    usage = Usage(store, UsageSettings(), database="", now=lambda: NOW)
    # That is the other one's: it works on them.
    await store.claim_run(HOUR)
    await usage.look()
    told = usage.run_count
    await usage.look()
    assert usage.run_count == told
    await forecast_run.run(database, since=0, hour=HOUR)
    await usage.look()
    assert usage.run_count == told + 1
    await usage.look()
    assert usage.run_count == told + 1


class Hours(UsageStore):
    """Notes from which hour on hours are read one by one."""

    since = 0

    async def hours(self, names: Collection[str], since: int) -> dict[str, list[UsageHour]]:
        self.since = since
        return await super().hours(names, since)


async def test_a_list_of_weeks_reads_no_hours_but_those_that_are_scored(
    store: UsageStore, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: set[int] = set()

    def scored(hours: Sequence[UsageHour], hour: int) -> Score | None:
        threads.add(threading.get_ident())
        return score_of(hours, hour)

    monkeypatch.setattr(usage_module, "score_of", scored)
    await report(store, "p", 1, *(Delta("a", HOUR - back, ONE) for back in (0, 100, 500, 839, 840)))
    rows = Hours(database)
    usage = Usage(rows, UsageSettings(), database="", now=lambda: NOW)
    seen = await usage.page("", 10, 840)
    assert [(one.model, one.counts.requests, one.hours) for one in seen] == [
        ("a", 4, ()),
        ("b", 0, ()),
        ("twin", 0, ()),
    ]
    assert rows.since == HOUR - 168
    assert threading.get_ident() not in threads, "it would hold up the event loop"
    (one,) = await usage.of(["a"], 840)
    assert (one.counts.requests, len(one.hours)) == (4, 4)


class Pages(Usage):
    """Notes how many models are asked for at once."""

    limit = 0

    async def page(self, after: str, limit: int, hour_count: int) -> list[ModelUsage]:
        self.limit = limit
        return await super().page(after, limit, hour_count)


async def test_pages_are_small_whatever_is_asked_for(store: UsageStore, database: Database) -> None:
    usage = Pages(store, UsageSettings(), database="", now=lambda: NOW)
    answer = await UsageServicer(usage, Store(database)).ListUsage(pb.ListUsageRequest(page_size=1000), None)
    assert len(answer.models) == 3
    # One more tells whether there is another page.
    assert usage.limit == 101


async def test_rows_of_forecasts_are_made_before_other_writers_wait(
    store: UsageStore, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    make_row, transaction = usage_store._forecast_row, database.transaction

    def noted(model: str, forecast: Forecast) -> dict[str, object]:
        steps.append(model)
        return make_row(model, forecast)

    @asynccontextmanager
    async def locked() -> AsyncIterator[AsyncConnection]:
        steps.append("lock")
        async with transaction() as connection:
            yield connection

    monkeypatch.setattr(usage_store, "_forecast_row", noted)
    monkeypatch.setattr(database, "transaction", locked)
    forecast = Forecast("daily", 99, HOUR, (Expectation(3, 1, 6),), NOW)
    await store.save_forecasts({"a": forecast, "b": forecast})
    assert steps == ["a", "b", "lock"]
    assert await store.forecasts() == {"a": forecast, "b": forecast}


@asynccontextmanager
async def served(database: Database, mesh: Mesh, usage: Usage) -> AsyncIterator[str]:
    server = MeshServer(
        listen="127.0.0.1:0",
        identity=mesh.identity("registry"),
        policy=access.POLICY,
        options=ServerOptions(drain_seconds=1.0),
    )
    add_UsageServiceServicer_to_server(UsageServicer(usage, Store(database)), server.grpc)
    server.serve(access.USAGE_SERVICE)
    async with server:
        try:
            yield server.address
        finally:
            usage.close()


@asynccontextmanager
async def client(mesh: Mesh, address: str, component: str) -> AsyncIterator[UsageClient]:
    async with Dialer(address, identity=mesh.identity(component), peer="registry") as dialer:
        yield UsageClient(dialer)


async def test_the_contract_over_mtls(templates: Templates, tmp_path: Path, mesh: Mesh) -> None:
    with templates.place("sqlite", tmp_path, is_empty=False) as place:
        async with opened(place) as database:
            for name, seed in (("a", "a"), ("b", "b"), ("c/d", "d")):
                await Store(database).put_model(name, (f"{name}-alias",), new(seed), NOW)
            usage = Usage(UsageStore(database), UsageSettings(), database="", now=lambda: NOW)
            async with (
                served(database, mesh, usage) as address,
                client(mesh, address, "proxy") as proxy,
                client(mesh, address, "admin-edge") as person,
            ):
                await proxy.report("p", 1, [Delta("c/d", HOUR - back, Counts(20, 7)) for back in range(30)])
                with pytest.raises(PermissionDenied):
                    await person.report("p", 2, [])
                with pytest.raises(InvalidRequest):
                    await proxy.report("p", 0, [])
                with pytest.raises(InvalidRequest):
                    await proxy.report("p", 2, [Delta("a", HOUR, ONE), Delta("a", HOUR, ONE)])
                async with aclosing(proxy.watch_targets()) as watched:
                    assert await anext(watched) == ()
                    await forecast_run.run(database, since=0, hour=HOUR)
                    await UsageStore(database).claim_run(HOUR)
                    await usage.look()
                    (target,) = await anext(watched)
                    assert (target.model, target.rung, target.expires_at) == ("c/d", Rung.READY, start_of(HOUR + 2))
                    assert [one.model for one in await person.list()] == ["a", "b", "c/d"]
                    seen = await person.get("c/d-alias", hour_count=3)
                    assert (seen.counts.requests, len(seen.hours), seen.target) == (60, 3, target)
                    assert seen.forecast is not None
                    assert len(seen.forecast.hours) == forecast_run.HORIZON_HOURS
                    assert len(await person.heat()) == 2
                    with pytest.raises(ModelNotFound):
                        await person.get("nobody")
                    usage.close()
                    with pytest.raises(Draining):
                        await anext(watched)
