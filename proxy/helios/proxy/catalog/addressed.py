"""Revisions that requests name apart from what their model serves: `m@prod`, `m@1f0c22`. Pure.

To routing, starting and counting, such a revision is a model of its own, `m@` and twelve digits of its digest, with its
own replicas; the tags that name it are aliases. So a tag that moves between two revisions that both run is at its new
place with the next request, and nothing is stopped for it. A tag that names the served revision is an alias of the
model itself. The canary of a rollout is such an entry, too, which the model's own one names.

Adapters belong to the model's own entry: an adapter's name can mean one thing only.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace

from helios.proxy.catalogue import ModelEntry, addressed_name
from helios.proxy.scaling.policy import Scaling
from helios.registry.client import Model, ModelPolicy, Revision

# Of references that people spelled out by digits; the ones of tags are told by the registry and bounded there.
MAX_SPELLINGS = 64


def entries_of(model: Model, spelled: Mapping[str, Revision]) -> list[ModelEntry]:
    """The model's own entry, then one for each other revision that a tag, a reference or a rollout names.

    `spelled` are references by digest that requests have used, as they spelled them, with what they mean.
    """
    names: dict[str, list[str]] = defaultdict(list)
    revisions = {model.revision.digest: model.revision}
    for tag in model.tags:
        revisions[tag.revision.digest] = tag.revision
        names[tag.revision.digest] += [f"{name}@{tag.name}" for name in (model.name, *model.aliases)]
    rollout = model.rollout
    if rollout is not None:
        revisions[rollout.revision.digest] = rollout.revision
        names[rollout.revision.digest] += ()
    for reference, revision in spelled.items():
        revisions[revision.digest] = revision
        names[revision.digest].append(reference)
    served = entry_from_model(model)
    own = replace(served, aliases=(*served.aliases, *names.pop(served.revision, ())))
    if rollout is not None:
        canary = addressed_name(model.name, rollout.revision.digest)
        own = replace(own, canary=canary, canary_percent=rollout.weight_percent)
    others = (_other(model, revisions[digest], aliases) for digest, aliases in sorted(names.items()))
    return [own, *others]


def entry_from_model(model: Model) -> ModelEntry:
    """The catalogue's form of a registry's model and what it serves."""
    profile = model.revision.profile
    return ModelEntry(
        name=model.name,
        revision=model.revision.digest,
        aliases=model.aliases,
        weights_bytes=profile.weights_bytes,
        kv_bytes_per_token=profile.kv_bytes_per_token,
        max_context_tokens=profile.max_context_tokens,
        parameter_count=profile.parameter_count,
        layer_count=profile.layer_count,
        vocabulary_size=profile.vocabulary_size,
        tensor_parallel_options=profile.tensor_parallel_options,
        pipeline_parallel_options=profile.pipeline_parallel_options,
        base_model=profile.base_model,
        dtype=profile.dtype,
        architecture=profile.architecture,
        source=model.revision.source,
        created_at=int(model.revision.created_at.timestamp()),
        min_replicas=model.policy.min_replicas,
        max_replicas=model.policy.max_replicas,
        engine_settings=model.engine_settings.document,
        scaling=_scaling(model.policy),
        is_durable=model.policy.is_durable,
        routing=model.policy.routing,
    )


def _scaling(policy: ModelPolicy) -> Scaling | None:
    """What a policy says beside two bounds; None: nothing."""
    scaling = Scaling(
        min_replicas=policy.min_replicas,
        max_replicas=policy.max_replicas,
        windows=policy.windows,
        idle_seconds=policy.idle_seconds,
        asleep_seconds=policy.asleep_seconds,
        staged_seconds=policy.staged_seconds,
    )
    return scaling if scaling != Scaling(policy.min_replicas, policy.max_replicas) else None


def _other(model: Model, revision: Revision, aliases: Iterable[str]) -> ModelEntry:
    entry = entry_from_model(replace(model, revision=revision))
    name = addressed_name(model.name, revision.digest)
    # min_replicas counts those of what the model serves: another revision has replicas while requests name it.
    return replace(
        entry,
        name=name,
        aliases=tuple(alias for alias in aliases if alias != name),
        min_replicas=0,
        scaling=replace(entry.scaling, min_replicas=0, windows=()) if entry.scaling is not None else None,
        engine_settings=_without_adapters(entry.engine_settings),
    )


def _without_adapters(document: str) -> str:
    settings = json.loads(document) if document else {}
    if "lora" not in settings:
        return document
    settings["lora"].pop("adapters", None)
    return json.dumps(settings, sort_keys=True)
