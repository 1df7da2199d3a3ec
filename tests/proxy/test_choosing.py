"""Whether a request goes at once is known before: whoever looks notes nothing, and what was foreseen happens."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from helios.mesh.routing import USUAL_ROUTING
from helios.proxy.admission.keyring import Caller
from helios.proxy.catalogue import ModelEntry
from helios.proxy.core import Core
from helios.proxy.explain.journal import Journal, JournalLimits
from helios.proxy.fleet.state import AdapterState, HeldAdapter, Load
from helios.proxy.holds import Hold
from helios.proxy.picker.choosing import Asked, Chooser
from helios.proxy.picker.request import read_heads
from helios.proxy.routing.pick import NO_WISHES
from helios.proxy.runtime import Runtime
from helios.proxy.traffic import LoadDelta
from tests.proxy.support import core, entry, hello, replica
from tests.proxy.test_adapters import adapter, lora
from tests.proxy.test_engine_settings import settings
from tests.proxy.test_kept_places import KEPT

NAMES = ("m", "pirate", "poet", "unheard")
REPLICAS = st.sampled_from(["r0", "r1", "r2"])
OPERATIONS = st.one_of(
    st.tuples(st.just("load"), REPLICAS, st.sampled_from([0, 1, 31, 32, 40]), st.integers(0, 4)),
    st.tuples(st.just("pick"), st.sampled_from(NAMES[:3]), st.integers(1, 3), st.integers(1, 4)),
    st.tuples(st.just("hold"), st.sampled_from(NAMES[:3]), st.integers(1, 3), st.booleans()),
    st.tuples(st.just("drain"), REPLICAS),
    st.tuples(st.just("cordon"), REPLICAS),
    st.tuples(st.just("fail"), REPLICAS),
)
HELD = st.dictionaries(REPLICAS, st.sets(st.sampled_from(["pirate", "poet"])), max_size=3)
outcomes: Counter[tuple[str, bool]] = Counter()


def in_state(*, keeps: bool, role: str, held: dict[str, set[str]], unpublished: set[str], todo: list[Any]) -> Core:
    """A core after all that."""
    subject = core()
    said = [{"name": name, "model": f"{name}-lora"} for name in ("pirate", "poet")]
    own = settings(lora={"adapters": said}, max_running_requests=4, **({"role": role} if role else {}))
    one = replace(entry("m", engine_settings=own), routing=KEPT if keeps else USUAL_ROUTING)
    subject.models_replaced([one, lora("pirate"), lora("poet")], 0.0, is_synced=True)
    for number, (replica_id, names) in enumerate(sorted(held.items())):
        has = tuple(HeldAdapter(adapter(name), AdapterState.LOADED) for name in sorted(names))
        made = replace(replica(replica_id, worker_id=f"w{replica_id}", address=f"1:{number}"), adapters=has)
        subject.worker_hello(hello(made.worker_id, replicas=(made,)), 0.0)
    shown = {one.address for one in subject.fleet.replicas_of("m") if one.replica_id not in unpublished}
    subject.endpoints_acknowledged(frozenset(shown), 0.0)
    for number, (what, *more) in enumerate(todo):
        happen(subject, one, what, more, number)
    return subject


def happen(subject: Core, one: ModelEntry, what: str, more: list[Any], number: int) -> None:
    """One of `OPERATIONS`."""
    match what:
        case "load":
            subject.load_report([LoadDelta(more[0], Load(running_count=more[2], waiting_count=more[1]))], 1.0)
        case "pick":
            for turn in range(more[2]):
                name = more[0] if more[0] in one.adapters else ""
                subject.pick(one, f"p{number}.{turn}", 1.0, name, NO_WISHES._replace(band=more[1]))
        case "hold":
            name, caller = more[0] if more[0] in one.adapters else "", Caller(priority=more[1])
            if more[2]:
                subject.hold(one, f"h{number}", size_bytes=1, deadline=99.0, now=1.0, adapter=name, caller=caller)
            else:  # One that nobody has looked at yet.
                subject.holds.admit(Hold(10_000 + number, f"h{number}", "m", 1, 1.0, 99.0, adapter=name, caller=caller))
        case "drain":
            subject.traffic.drain_asked(more[0])
        case "cordon":
            subject.cordon(f"w{more[0]}", 1.0, is_cordoned=True)
        case "fail":
            failures = tuple((f"f{number}.{turn}", 14) for turn in range(5))
            subject.load_report([LoadDelta(more[0], Load(), finished=failures)], 1.0)


@given(
    keeps=st.booleans(),
    role=st.sampled_from(["", "", "decode"]),
    held=HELD,
    unpublished=st.sets(REPLICAS, max_size=1),
    todo=st.lists(OPERATIONS, max_size=8),
    name=st.sampled_from(NAMES),
    band=st.integers(1, 3),
)
@hypothesis_settings(max_examples=400, deadline=None)
def check_that_it_is_foreseen(
    *, keeps: bool, role: str, held: dict[str, set[str]], unpublished: set[str], todo: list[Any], name: str, band: int
) -> None:
    subject = in_state(keeps=keeps, role=role, held=held, unpublished=unpublished, todo=todo)
    one = subject.catalogue.get("m")
    assert one is not None
    chooser = Chooser(cast("Runtime", SimpleNamespace(core=subject, journal=Journal(JournalLimits()))))
    reserved = subject.traffic.ledger.statistics()
    foreseen = chooser.goes_at_once(one, name, band)
    assert subject.traffic.ledger.statistics() == reserved, "a look"
    asked = Asked(name, read_heads({"x-request-id": "q"}), Caller(priority=band), 1.0, "")
    assert foreseen is (chooser.pick(one, asked, NO_WISHES, split="") is not None)
    outcomes[f"{name} {keeps}", foreseen] += 1


def test_whether_a_request_goes_at_once_is_foreseen() -> None:
    outcomes.clear()
    check_that_it_is_foreseen()
    for name in NAMES[:3]:
        for keeps in (False, True):
            for foreseen in (False, True):
                assert outcomes[f"{name} {keeps}", foreseen], (name, keeps, foreseen)
