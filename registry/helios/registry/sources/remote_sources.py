"""From the text that a person wrote to a source, whatever it names: the composition of all places."""

import json
from typing import Final

from helios.registry import offload
from helios.registry.engine_settings import EngineSettings
from helios.registry.records import IngestSpec
from helios.registry.sources.conversion import Converter
from helios.registry.sources.http_directory import HttpDirectory
from helios.registry.sources.hugging_face import HuggingFaceRepository
from helios.registry.sources.modelscope import ModelScopeRepository
from helios.registry.sources.object_prefix import ObjectPrefix
from helios.registry.sources.oci import OciRepository
from helios.registry.sources.patterns import Selection
from helios.registry.sources.pulled import Fetcher, PulledSource, choice_of, choose
from helios.registry.sources.reference import (
    STORE_SCHEMES,
    HubReference,
    OciReference,
    Reference,
    UrlReference,
    invalid_source,
    parse_reference,
)
from helios.registry.sources.remote import Repository, fingerprint
from helios.registry.sources.resolve import MAX_SOURCE_CHARS, resolve_source
from helios.registry.sources.settings import SourceSettings
from helios.registry.sources.source import Source
from helios.registry.sources.web import Web

# vLLM has a list of architectures; what these take only they can tell.
_ENGINES_WITHOUT_LIST: Final = frozenset({"transformers", "custom", "simulated"})


class Sources:
    """Every place that models come from."""

    def __init__(self, converter: Converter, web: Web, settings: SourceSettings) -> None:
        """Takes what sources share; ``web`` stays the caller's, who opens and closes it."""
        self._converter = converter
        self._web = web
        self._settings = settings

    async def open(self, spec: IngestSpec, engine_settings: EngineSettings | None, fetcher: Fetcher) -> Source:
        """Returns the source that an ingest is from; no request is made yet.

        Args:
            spec: What to ingest.
            engine_settings: Those that the model will have; None: the default engine's.
            fetcher: Gets bytes for this ingest.

        Raises:
            InvalidRequest: INVALID_SOURCE.
        """
        selection = Selection(spec.include, spec.exclude)
        if len(spec.source) > MAX_SOURCE_CHARS or not spec.source.isprintable():
            raise invalid_source(f"a source is printable text of at most {MAX_SOURCE_CHARS} characters")
        reference = parse_reference(spec.source)
        if reference is None:
            return await offload.run(lambda _: resolve_source(spec.source, self._converter, selection))
        return PulledSource(
            str(reference),
            self._repository(reference),
            fetcher,
            self._converter,
            selection=selection,
            is_any_architecture=_engine(engine_settings) in _ENGINES_WITHOUT_LIST,
        )

    async def identify(self, spec: IngestSpec, engine_settings: EngineSettings | None) -> tuple[str, str]:
        """Looks at a source that is reached by a network; reads none of its files.

        Returns:
            What stands for what it has now, empty where it does not name its files' content; and what stands beside
            that where it is remembered what was made of it.

        Raises:
            InvalidRequest: INVALID_SOURCE, INVALID_PATTERN.
            HeliosError: As ``Repository.list_files``.
        """
        reference = parse_reference(spec.source)
        if reference is None:
            raise invalid_source("only sources that are reached by a network can be looked at")
        listing = await self._repository(reference).list_files()
        chosen = choose(listing, Selection(spec.include, spec.exclude), spec.source)
        is_any = _engine(engine_settings) in _ENGINES_WITHOUT_LIST
        return fingerprint(chosen), choice_of(is_any_architecture=is_any)

    def _repository(self, reference: Reference) -> Repository:
        match reference:
            case HubReference(scheme="hf"):
                return HuggingFaceRepository(reference, self._web, self._settings.hugging_face)
            case HubReference():
                return ModelScopeRepository(reference, self._web, self._settings.modelscope)
            case OciReference():
                return OciRepository(reference, self._web, self._settings.oci)
            case UrlReference(scheme=scheme) if scheme in STORE_SCHEMES:
                return ObjectPrefix(reference, self._settings.stores)
            case UrlReference():
                return HttpDirectory(reference, self._web)


def _engine(settings: EngineSettings | None) -> str:
    if settings is None:
        return ""
    name: str = json.loads(settings.document).get("engine", "")
    return name.partition(":")[0]
