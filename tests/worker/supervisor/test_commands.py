"""Commands: answered each time, carried out once."""

import hypothesis.strategies as st
from hypothesis import given

from helios.mesh.errors import InvalidRequest, Overloaded
from helios.worker.supervisor.commands import Ack, CommandLog


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans())))
def test_a_command_that_comes_twice_is_answered_twice_and_carried_out_once(sent: list[tuple[int, bool]]) -> None:
    log = CommandLog()
    carried_out: list[str] = []
    first_answers: dict[str, Ack] = {}

    def carry_out(command_id: str, is_refused: bool) -> None:
        carried_out.append(command_id)
        if is_refused:
            raise Overloaded("full", reason="NO_CAPACITY")

    for number, is_refused in sent:
        command_id = f"c{number}"
        answer = log.run(command_id, lambda c=command_id, r=is_refused: carry_out(c, r))  # type: ignore[misc]
        assert answer == first_answers.setdefault(command_id, answer)
    assert len(carried_out) == len(set(carried_out)) == len(first_answers)


@given(st.lists(st.integers(0, 50), max_size=200))
def test_memory_is_bounded_and_keeps_the_latest(sent: list[int]) -> None:
    log = CommandLog(capacity=8)
    for number in sent:
        log.run(str(number), lambda: None)
        assert str(number) in log
    assert len(log) <= 8


def test_a_refusal_carries_reason_and_message() -> None:
    def refuse() -> None:
        raise InvalidRequest("engine 'x' is not here", reason="UNKNOWN_ENGINE")

    answer = CommandLog().run("c", refuse)
    assert (answer.is_accepted, answer.refused_reason, answer.message) == (
        False,
        "UNKNOWN_ENGINE",
        "engine 'x' is not here",
    )


def test_a_command_without_an_id_is_refused_and_not_remembered() -> None:
    log = CommandLog()
    assert log.run("", lambda: None).refused_reason == "COMMAND_ID_MISSING"
    assert len(log) == 0
