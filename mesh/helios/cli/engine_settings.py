"""Engine settings on the command line: ``key=value``, typed by the contract, which is also where the keys come from.

A key is a field's name, with dots into a message (``speculative_decoding.method``); enums have short names
(``compilation=eager``), lists are comma separated, bytes take a unit (``kv_cache_bytes=256MiB``), ``@path`` reads a
text from a file, adapters are ``NAME:MODEL``. What values mean, and whether they can be, is said by the registry and by
the engine.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from google.protobuf.descriptor import EnumDescriptor, FieldDescriptor

from helios.api.engine.v1.engine_settings_pb2 import EngineSettings, LoraAdapter
from helios.mesh.errors import InvalidRequest

# Filled in by the proxy when a replica is started.
_HIDDEN: Final = ("speculative_decoding.draft_revision",)
_OPTIONS: Final = "options."
_TRUE: Final = ("true", "yes", "on", "1")
_FALSE: Final = ("false", "no", "off", "0")
_UNITS: Final[Mapping[str, int]] = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_SIZE: Final = re.compile(r"(\d+)\s*(KiB|MiB|GiB|TiB|)")


def setting_keys() -> list[str]:
    """Returns the keys that there are, in the contract's order."""
    return [key for key, _ in _fields(EngineSettings.DESCRIPTOR, "") if key not in _HIDDEN]


def change(settings: EngineSettings, assignments: Sequence[str], removals: Sequence[str] = ()) -> EngineSettings:
    """Returns a copy with ``key=value`` assigned and keys removed.

    Raises:
        InvalidRequest: UNKNOWN_SETTING, INVALID_ENGINE_SETTINGS; the key is named.
    """
    changed = EngineSettings()
    changed.CopyFrom(settings)
    for key in removals:
        _unset(changed, key)
    for assignment in assignments:
        key, separator, value = assignment.partition("=")
        if not separator:
            raise _invalid(key, "has no value; write it as key=value")
        _set(changed, key.strip(), value)
    return changed


def flatten(settings: EngineSettings) -> dict[str, str]:
    """Returns what is set, as it would be written on the command line."""
    return dict(_written(settings, ""))


def _fields(message: Any, prefix: str) -> Iterator[tuple[str, FieldDescriptor]]:
    for field in message.fields:
        key = f"{prefix}{field.name}"
        if field.message_type is None or _is_list(field):
            yield (f"{_OPTIONS}NAME" if _is_map(field) else key), field
        else:
            yield from _fields(field.message_type, f"{key}.")


def _set(settings: EngineSettings, key: str, text: str) -> None:
    if key.startswith(_OPTIONS) and key != _OPTIONS:
        settings.options[key.removeprefix(_OPTIONS)] = text
        return
    field = _find(key)
    owner = _owner(settings, key)
    if _is_list(field):
        values = [_value(key, field, part.strip()) for part in text.split(",") if part.strip()]
        owner.ClearField(field.name)
        getattr(owner, field.name).extend(values)
    else:
        setattr(owner, field.name, _value(key, field, text))


def _unset(settings: EngineSettings, key: str) -> None:
    if key.startswith(_OPTIONS) and key != _OPTIONS:
        settings.options.pop(key.removeprefix(_OPTIONS), None)
        return
    part, _, rest = key.partition(".")
    if not rest and part in EngineSettings.DESCRIPTOR.fields_by_name:
        # Also a whole group: `--unset speculative_decoding`.
        settings.ClearField(part)  # type: ignore[arg-type]
        return
    field = _find(key)
    _owner(settings, key).ClearField(field.name)
    if not getattr(settings, part).ByteSize():
        settings.ClearField(part)  # type: ignore[arg-type]


def _find(key: str) -> FieldDescriptor:
    for name, field in _fields(EngineSettings.DESCRIPTOR, ""):
        if name == key and key not in _HIDDEN and not _is_map(field):
            return field
    raise InvalidRequest(
        f"there is no engine setting {key!r}; there are: {', '.join(setting_keys())}", reason="UNKNOWN_SETTING"
    )


def _owner(settings: EngineSettings, key: str) -> Any:
    group, separator, _ = key.rpartition(".")
    return getattr(settings, group) if separator else settings


def _value(key: str, field: FieldDescriptor, text: str) -> Any:
    if field.message_type is not None:
        name, separator, model = text.partition(":")
        if not separator:
            raise _invalid(key, f"{text!r} is not NAME:MODEL")
        return LoraAdapter(name=name, model=model)
    if field.enum_type is not None:
        return _enum_value(key, field.enum_type, text)
    if field.type == FieldDescriptor.TYPE_BOOL:
        if text.lower() not in (*_TRUE, *_FALSE):
            raise _invalid(key, f"{text!r} is neither true nor false")
        return text.lower() in _TRUE
    if field.type == FieldDescriptor.TYPE_STRING:
        return _read(key, text) if text.startswith("@") else text
    return _number(key, field, text)


def _enum_value(key: str, kind: EnumDescriptor, text: str) -> int:
    names = _short_names(kind)
    if text.lower() not in names:
        raise _invalid(key, f"{text!r} is not one of {', '.join(names)}")
    return names[text.lower()]


def _number(key: str, field: FieldDescriptor, text: str) -> int:
    units = _UNITS if key.endswith("_bytes") else {"": 1}
    match = _SIZE.fullmatch(text.strip())
    if match is None or match[2] not in units:
        form = "a number, or one with KiB, MiB, GiB or TiB" if len(units) > 1 else "a whole number from 0"
        raise _invalid(key, f"{text!r} is not {form}")
    number = int(match[1]) * units[match[2]]
    if number >= 1 << (64 if field.type == FieldDescriptor.TYPE_UINT64 else 32):
        raise _invalid(key, f"{text} is too large")
    return number


def _read(key: str, text: str) -> str:
    try:
        return Path(text.removeprefix("@")).expanduser().read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise _invalid(key, f"{text.removeprefix('@')} can't be read: {error}") from error


def _written(message: Any, prefix: str) -> Iterator[tuple[str, str]]:
    for field, value in message.ListFields():
        key = f"{prefix}{field.name}"
        if _is_map(field):
            yield from ((f"{_OPTIONS}{name}", value[name]) for name in sorted(value))
        elif _is_list(field):
            yield key, ",".join(_text(field, item) for item in value)
        elif field.message_type is not None:
            yield from _written(value, f"{key}.")
        elif key not in _HIDDEN:
            yield key, _text(field, value)


def _text(field: FieldDescriptor, value: Any) -> str:
    if isinstance(value, LoraAdapter):
        return f"{value.name}:{value.model}"
    if field.enum_type is not None:
        return next((name for name, number in _short_names(field.enum_type).items() if number == value), str(value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _short_names(kind: EnumDescriptor) -> dict[str, int]:
    """Returns the names of an enum without its own, which every one of them begins with; "not set" is no choice."""
    prefix = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", kind.name).upper() + "_"
    return {value.name.removeprefix(prefix).lower(): value.number for value in kind.values if value.number}


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def _is_list(field: FieldDescriptor) -> bool:
    return field.is_repeated


def _invalid(key: str, message: str) -> InvalidRequest:
    return InvalidRequest(f"{key}: {message}", reason="INVALID_ENGINE_SETTINGS", metadata={"param": key})
