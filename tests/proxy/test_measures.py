"""Measured sizes over restarts and between proxies: told to a real registry, and known by the next proxy."""

from pathlib import Path

import pytest

from helios.mesh.errors import HeliosError, Unavailable
from helios.proxy.catalogue import Catalogue
from helios.proxy.measures import MeasureExchange
from helios.proxy.sizing import MeasuredSizes, SizingPolicy, replica_size
from helios.registry.client import Measure, ProfileClient
from tests.proxy.support import GIB, entry
from tests.registry.support import Mesh, open_parts, serve
from tests.registry.test_store import A, new

SETTINGS = '{"max_context_tokens": 64}'
POLICY = SizingPolicy(overhead_bytes=1 << 20, context_count=1, min_kv_cache_bytes=1 << 20, max_kv_cache_bytes=GIB)


class Away:
    """A registry that can't be reached."""

    async def exchange(self, measured: list[Measure], revisions: list[str]) -> list[Measure]:
        raise Unavailable(f"away: {len(measured)} {len(revisions)}")


def catalogue() -> Catalogue:
    made = Catalogue()
    made.replace([entry(revision=A, engine_settings=SETTINGS)])
    return made


def measured(sizes: MeasuredSizes, fixed_bytes: int) -> None:
    sizes.record(A, SETTINGS, measured_bytes=fixed_bytes + 100, given_bytes=100)


async def test_the_next_proxy_knows_what_the_first_one_measured(tmp_path: Path) -> None:
    mesh = Mesh(tmp_path / "pki")
    async with open_parts(tmp_path / "registry") as parts, serve(parts, mesh) as address:
        await parts.catalog.put_model("m", (), new("a"))
        async with mesh.dialer(address, "proxy") as dialer:
            client = ProfileClient(dialer)
            first = MeasuredSizes()
            exchange = MeasureExchange(first, catalogue(), client)
            measured(first, 3 * GIB)
            await exchange.exchange()
            # What is less than is known already is no news.
            measured(first, 2 * GIB)
            assert first.take_news(9) == {}
            second = MeasuredSizes()
            assert second.fixed_bytes(A, SETTINGS) is None
            await MeasureExchange(second, catalogue(), client).exchange()
            assert second.fixed_bytes(A, SETTINGS) == 3 * GIB
            assert second.fixed_bytes(A, SETTINGS, is_gpu=True) is None
            booked = replica_size(entry(revision=A, engine_settings=SETTINGS), POLICY, measured=second)
            assert booked.memory_bytes > 3 * GIB
            # It has measured more itself: the larger one counts, for both.
            measured(second, 4 * GIB)
            assert second.fixed_bytes(A, SETTINGS) == 4 * GIB
            await MeasureExchange(second, catalogue(), client).exchange()
            third = MeasuredSizes()
            await MeasureExchange(third, catalogue(), client).exchange()
            assert third.fixed_bytes(A, SETTINGS) == 4 * GIB


async def test_what_nobody_took_is_told_later() -> None:
    sizes = MeasuredSizes()
    measured(sizes, 7)
    with pytest.raises(HeliosError):
        await MeasureExchange(sizes, catalogue(), Away()).exchange()
    measured(sizes, 5)
    assert list(sizes.take_news(9).values()) == [7]


def test_what_no_model_has_is_forgotten() -> None:
    sizes = MeasuredSizes()
    measured(sizes, 7)
    sizes.tell(next(iter(sizes.take_news(1))), 9)
    assert sizes.fixed_bytes(A, SETTINGS) == 9
    sizes.keep_only({(A, "{}")})
    assert sizes.fixed_bytes(A, SETTINGS) is None
