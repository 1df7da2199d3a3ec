"""The profile of a revision, put together when somebody asks."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from helios.mesh.errors import PreconditionFailed
from helios.registry import offload
from helios.registry.catalog import Catalog
from helios.registry.inspection import CONFIG, WEIGHT_SUFFIX, read_header
from helios.registry.manifest import Digest
from helios.registry.names import Reference
from helios.registry.profiles.fits import Fit, fits_of, pipeline_parallel_options, tensor_parallel_options
from helios.registry.profiles.measure import Measure
from helios.registry.profiles.measures import MeasureStore
from helios.registry.profiles.planner import Plan, Planner
from helios.registry.profiles.shape import Layout, layout_of, shape_of
from helios.registry.records import Revision
from helios.registry.strict_json import parse_object

# As inspection bounds it.
_MAX_CONFIG_BYTES: Final = 8 << 20


@dataclass(frozen=True, slots=True)
class FullProfile:
    """What a revision needs of devices. ``plan`` is None where none was asked for or could be made; then ``why``."""

    revision: Revision
    layout: Layout
    tensor_parallel: tuple[int, ...]
    pipeline_parallel: tuple[int, ...]
    fits: tuple[Fit, ...]
    measures: tuple[Measure, ...]
    plan: Plan | None = None
    why_no_plan: str = ""


class Profiles:
    """Reads what profiles are made of: configs, headers, measures."""

    def __init__(self, catalog: Catalog, measures: MeasureStore, planner: Planner) -> None:
        self.measures = measures
        self._catalog = catalog
        self._planner = planner

    async def describe(self, reference: Reference, *, has_plan: bool) -> FullProfile:
        """Describes a revision.

        Raises:
            ModelNotFound, NotFound, RevisionNotFound, InvalidRequest: As ``Store.resolve``.
            PreconditionFailed: NO_PROFILE, it is an adapter.
            Corrupted: BLOB_MISSING.
        """
        revision = (await self._catalog.store.resolve(reference)).revision
        if revision.profile.base_model:
            raise PreconditionFailed(
                "a LoRA adapter needs what its model's replicas have; ask for that model's profile",
                reason="NO_PROFILE",
                metadata={"revision": revision.digest},
            )
        located = await self._catalog.locate(revision.digest)
        files = {entry.path: entry.digest for entry in located.manifest.entries}
        config, layout = await offload.run(lambda stop: self._read(files, stop))
        shape = shape_of(parse_object(config, CONFIG), revision.profile)
        plan = await self._planner.plan(files[CONFIG].hash, config) if has_plan else None
        return FullProfile(
            revision=revision,
            layout=layout,
            tensor_parallel=tensor_parallel_options(shape),
            pipeline_parallel=pipeline_parallel_options(shape),
            fits=fits_of(
                shape,
                layout,
                kv_bytes_per_token=revision.profile.kv_bytes_per_token,
                max_context_tokens=revision.profile.max_context_tokens,
            ),
            measures=tuple(await self.measures.of([revision.digest])),
            plan=plan if isinstance(plan, Plan) else None,
            why_no_plan=plan if isinstance(plan, str) else "",
        )

    def _read(self, files: Mapping[str, Digest], stop: offload.Stop) -> tuple[bytes, Layout]:
        blobs = self._catalog.blobs
        with blobs.file(files[CONFIG].hash).open("rb") as file:
            config = file.read(_MAX_CONFIG_BYTES)
        headers = []
        for path in sorted(files):
            if path.endswith(WEIGHT_SUFFIX):
                stop.check()
                headers.append(read_header(blobs.file(files[path].hash), path))
        return config, layout_of(headers)
