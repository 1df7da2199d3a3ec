"""The relay process: the composition root of `python -m helios.proxy.relay`."""

from contextlib import AsyncExitStack

from helios.mesh.channel import Dialer
from helios.mesh.errors import InvalidRequest
from helios.mesh.process import Lifetime, run
from helios.mesh.server import HEALTH_SERVICE, MeshServer, ServerOptions
from helios.proxy.relay.moves import MoveTeller
from helios.proxy.relay.replicas import Replicas
from helios.proxy.relay.servicer import INFERENCE_SERVICE, OPENAI_SERVICE, RelayServicer
from helios.proxy.relay.session import Surroundings
from helios.proxy.relay.settings import RelaySettings

_POLICY = {
    OPENAI_SERVICE: frozenset({"edge"}),
    INFERENCE_SERVICE: frozenset({"edge"}),
    HEALTH_SERVICE: frozenset({"*"}),
}


async def main(settings: RelaySettings, lifetime: Lifetime) -> None:
    """Runs the relay until it is asked to stop."""
    if not settings.proxies:
        raise InvalidRequest("proxies: at least one, to ask for other replicas")
    identity = settings.mesh.identity
    async with AsyncExitStack() as stack:
        replicas = Replicas(identity)
        stack.push_async_callback(replicas.close)
        proxies = [
            await stack.enter_async_context(Dialer(target, identity=identity, peer="proxy"))
            for target in settings.proxies
        ]
        moves = MoveTeller(proxies)
        lifetime.group.create_task(moves.run(), name="tell moves")
        around = Surroundings(replicas, proxies, settings.replace_seconds, settings.barren_limit, moves)
        options = ServerOptions(drain_seconds=settings.drain_seconds, transport="http2")
        server = MeshServer(listen=settings.listen, identity=identity, policy=_POLICY, options=options)
        RelayServicer(around, max_held_bytes=settings.max_held_bytes).add_to(server.grpc)
        server.serve(OPENAI_SERVICE, INFERENCE_SERVICE, with_reflection=False)
        async with server:
            lifetime.mark_ready(address=server.address)
            await lifetime.wait_stop()


if __name__ == "__main__":
    run("relay", RelaySettings, main, is_hot=True)
