"""Reads the files of a model as far as its profile needs them: config, index, safetensors headers.

It runs twice: on the source, so that a wrong one is refused before a byte is stored, and on the stored blobs, because
only those can't change any more.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import BinaryIO, Final, Literal, Protocol

from helios.registry.model_card import CARD, MAX_CARD_BYTES, read_license
from helios.registry.profile import ModelProfile, build_adapter_profile, build_profile, check_shards, read_weight_map
from helios.registry.profiles.fits import pipeline_parallel_options, tensor_parallel_options
from helios.registry.profiles.shape import shape_of
from helios.registry.safetensors_header import LENGTH_BYTES, SafetensorsHeader, header_length, parse_header
from helios.registry.strict_json import malformed, parse_object

CONFIG: Final = "config.json"
INDEX: Final = "model.safetensors.index.json"
SINGLE: Final = "model.safetensors"
ADAPTER_CONFIG: Final = "adapter_config.json"
ADAPTER_WEIGHTS: Final = "adapter_model.safetensors"
WEIGHT_SUFFIX: Final = ".safetensors"
# The largest configs (quantised, with a list of layers) have 1 MB.
_MAX_CONFIG_BYTES: Final = 8 << 20
# 100 bytes for each of a million tensors.
_MAX_INDEX_BYTES: Final = 128 << 20


class Readable(Protocol):
    """What can be opened for reading: a path, or a blob, wherever it is."""

    def open(self, mode: Literal["rb"]) -> BinaryIO:
        """Opens it; the file can seek."""
        ...


def inspect_model(files: Mapping[str, Readable]) -> ModelProfile:
    """Returns the profile of the model that these files are. Blocking.

    Args:
        files: Where the bytes of each path of the model are.

    Raises:
        InvalidRequest: UNSUPPORTED_FORMAT, when they are not a complete, consistent model.
        OSError: A file can't be read.
    """
    if ADAPTER_CONFIG in files and CONFIG not in files:
        adapter = parse_object(_read_bounded(files[ADAPTER_CONFIG], _MAX_CONFIG_BYTES, ADAPTER_CONFIG), ADAPTER_CONFIG)
        profile = build_adapter_profile(adapter, read_header(files[ADAPTER_WEIGHTS], ADAPTER_WEIGHTS))
        return replace(profile, license=_license(files))
    if CONFIG not in files:
        raise malformed("config.json is missing")
    headers = {path: read_header(files[path], path) for path in sorted(files) if path.endswith(WEIGHT_SUFFIX)}
    weight_map = read_index(files[INDEX]) if INDEX in files else None
    check_shards(weight_map, headers)
    config = parse_object(_read_bounded(files[CONFIG], _MAX_CONFIG_BYTES, CONFIG), CONFIG)
    profile = build_profile(config, headers)
    shape = shape_of(config, profile)
    return replace(
        profile,
        license=_license(files),
        tensor_parallel_options=tensor_parallel_options(shape),
        pipeline_parallel_options=pipeline_parallel_options(shape),
    )


def read_header(location: Readable, what: str) -> SafetensorsHeader:
    """Reads and checks the header of a safetensors file. Raises InvalidRequest, OSError."""
    with location.open("rb") as file:
        file_bytes = file.seek(0, 2)
        file.seek(0)
        length = header_length(file.read(LENGTH_BYTES), file_bytes, what)
        return parse_header(file.read(length), file_bytes, what)


def read_index(location: Readable) -> dict[str, str]:
    """Reads the weight map of an index. Raises InvalidRequest, OSError."""
    return read_weight_map(parse_object(_read_bounded(location, _MAX_INDEX_BYTES, INDEX), INDEX))


def select_weights(names: Iterable[str], weight_map: Mapping[str, str] | None) -> set[str]:
    """Returns which of a directory's safetensors files are the model.

    With an index those it names; else ``model.safetensors``; else all, which ``check_shards`` then holds to have no
    tensor twice.

    Raises:
        InvalidRequest: UNSUPPORTED_FORMAT, when a shard of the index is missing or there is none at all.
    """
    found = {name for name in names if name.endswith(WEIGHT_SUFFIX)}
    if weight_map is not None:
        wanted = set(weight_map.values())
        if missing := wanted - found:
            raise malformed(f"{min(missing)} is missing; the index names {len(wanted)} files")
        return wanted
    if SINGLE in found:
        return {SINGLE}
    return found


def _license(files: Mapping[str, Readable]) -> str:
    if CARD not in files:
        return ""
    with files[CARD].open("rb") as file:
        return read_license(file.read(MAX_CARD_BYTES))


def _read_bounded(location: Readable, limit: int, what: str) -> bytes:
    with location.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise malformed(f"{what} is larger than {limit >> 20} MiB")
    return content
