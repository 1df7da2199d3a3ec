"""The express lane in the real Envoy: what it takes, and that it is acknowledged as a whole."""

import httpx
import pytest

from tests.wire.gateway import Gateway

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.leaks("Envoy keeps connections to the module's fakes, which are in this process"),
]
CHAT = "/v1/chat/completions"


async def asked(gateway: Gateway, client: httpx.AsyncClient, path: str = CHAT, **options: object) -> bool:
    """Sends a request, which is answered; whether the picker was asked."""
    before = len(gateway.picker.requests)
    answer = await client.post(path, **options)  # type: ignore[arg-type]
    assert answer.status_code == 200, answer.text
    return len(gateway.picker.requests) > before


async def test_a_model_in_the_lane_is_routed_without_the_picker(gateway: Gateway, rest: httpx.AsyncClient) -> None:
    assert await asked(gateway, rest, json={"model": "m"}), "without a lane the picker is asked"
    await gateway.publish_express("m", "100%")
    for path in (CHAT, "/v1/completions", "/v1/embeddings"):
        assert not await asked(gateway, rest, path, json={"model": "m"}), path
    call = gateway.replica.calls[-1]
    assert call.metadata["x-helios-route-model"] == "m"
    assert call.metadata["x-helios-route-revision"] == "sha256:1"
    assert not await asked(gateway, rest, json={"model": "100%"})
    assert gateway.replica.calls[-1].metadata["x-helios-route-model"] == "100%"
    await gateway.publish_express()
    assert await asked(gateway, rest, json={"model": "m"})


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        ({"model": "other"}, {}),
        ({"model": "m "}, {}),
        ({"model": "m"}, {"authorization": "Bearer sk-helios-abc"}),
        ({"model": "m"}, {"x-helios-model": "m"}),
        ({"model": "m"}, {"x-helios-durable": "true"}),
        ({"model": "m", "padding": "x" * 100_000}, {}),
    ],
    ids=["other model", "like the name", "one of our keys", "named in a header", "durable", "large"],
)
async def test_what_the_picker_has_a_say_in_is_asked_about(
    gateway: Gateway, rest: httpx.AsyncClient, body: dict[str, str], headers: dict[str, str]
) -> None:
    await gateway.publish_express("m")
    assert await asked(gateway, rest, json=body, headers=headers)


async def test_a_clients_own_key_is_no_hindrance_and_goes_no_further(gateway: Gateway, rest: httpx.AsyncClient) -> None:
    await gateway.publish_express("m")
    assert not await asked(gateway, rest, json={"model": "m"}, headers={"authorization": "Bearer EMPTY"})
    assert "authorization" not in gateway.replica.calls[-1].metadata


async def test_clients_can_not_take_the_lane_by_themselves(gateway: Gateway, rest: httpx.AsyncClient) -> None:
    headers = {"x-helios-endpoint": gateway.replica_address, "x-helios-route-model": "m"}
    assert await asked(gateway, rest, json={"model": "m"}, headers=headers)


async def test_an_endpoint_that_is_gone_is_a_503(gateway: Gateway, rest: httpx.AsyncClient) -> None:
    await gateway.publish_express("m")
    await gateway.publish("127.0.0.1:9")
    answer = await rest.post(CHAT, json={"model": "m"})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
