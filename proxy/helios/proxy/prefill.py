"""Which replica computes a prompt for another one, of models whose prompts and answers are made apart. Pure."""

from helios.proxy.catalogue import Catalogue, ModelEntry
from helios.proxy.lifecycle import Lifecycle
from helios.proxy.routing.pick import Pick, pick
from helios.proxy.traffic import Traffic


def prefill_endpoint(
    entry: ModelEntry, chosen: Pick, now: float, *, traffic: Traffic, lifecycle: Lifecycle, among: Catalogue
) -> str:
    """Returns the address of a replica that computes the prompt for the chosen one; empty where there is none.

    One on the same worker goes first: there a KV cache travels through memory or files. A model that computes prompts
    is in use while its decode model is, so the next tick starts it where it has no replica; nobody waits for that,
    since the decode replica can compute a prompt, too.
    """
    if entry.role != "decode":
        return ""
    best = traffic.fleet.replica(chosen.choices[0].replica_id)
    for other in among.prefill_models(entry.revision):
        traffic.use(other.name, now)
        found = pick(other.name, other.revision, traffic.table.snapshot(other.name, other.revision))
        if found is None:
            # Looked at by the next tick from now on.
            lifecycle.activation(other.name)
            continue
        replicas = {choice.address: traffic.fleet.replica(choice.replica_id) for choice in found.choices}
        near = [
            address
            for address, replica in replicas.items()
            if replica is not None and best is not None and replica.worker_id == best.worker_id
        ]
        return (near or list(replicas))[0]
    return ""
