"""From the text that a person wrote to a source of this machine."""

from pathlib import Path
from typing import Final

from helios.mesh.errors import InvalidRequest
from helios.registry.inspection import WEIGHT_SUFFIX
from helios.registry.sources.conversion import Converter
from helios.registry.sources.directory import DirectorySource
from helios.registry.sources.embedded import EmbeddedSource
from helios.registry.sources.gguf import GGUF_SUFFIX, GgufSource, choose_gguf
from helios.registry.sources.patterns import ALL, Selection
from helios.registry.sources.source import Source

# PATH_MAX; the text is stored and shown.
MAX_SOURCE_CHARS: Final = 4096


def resolve_source(text: str, converter: Converter, selection: Selection = ALL) -> Source:
    """Returns the source that a text names.

    Args:
        text: An absolute path of a directory or a ``.gguf`` file, or ``embedded:<name>``; the forms ``dir:<path>`` and
            ``gguf:<path>``, which revisions say, are taken too.
        converter: Converts what is not safetensors.
        selection: Which files of a directory are wanted.

    Raises:
        InvalidRequest: INVALID_SOURCE; INVALID_PATTERN, there is one file, or the patterns leave none.
    """
    if len(text) > MAX_SOURCE_CHARS or not text.isprintable():
        raise _invalid("a source is printable text of at most 4,096 characters")
    kind, separator, rest = text.partition(":")
    if separator and kind == "embedded":
        _refuse_patterns(text, selection)
        return EmbeddedSource(rest, converter)
    path = Path(rest if separator and kind in {"dir", "gguf"} else text)
    if not path.is_absolute():
        raise _invalid(
            f"{text!r} is not a source: an absolute path of a directory with safetensors or of a .gguf file on the"
            " registry's machine, embedded:NAME, hf:ORGANISATION/NAME, ms:ORGANISATION/NAME, https://…, s3://…, gs://…,"
            " az://… or oci://…"
        )
    try:
        if path.is_dir():
            return _directory(path, converter, selection)
        if path.is_file():
            _refuse_patterns(text, selection)
            if path.suffix.lower() == GGUF_SUFFIX:
                return GgufSource(path, converter)
            raise _invalid(f"{path} is neither a directory nor a .gguf file")
    except OSError as error:
        raise _invalid(f"{path} can't be read: {error.strerror}") from error
    raise _invalid(f"{path} does not exist on the registry's machine, or the registry may not read it")


def _directory(path: Path, converter: Converter, selection: Selection) -> Source:
    """Returns a directory's source: its GGUF file where it has no safetensors."""
    files = [file for file in path.iterdir() if selection.takes(file.name)]
    if not files and selection != ALL:
        raise InvalidRequest(
            f"none of the files of {path} is left by the patterns",
            reason="INVALID_PATTERN",
            metadata={"param": "include"},
        )
    sizes = {file.name: file.stat().st_size for file in files if file.suffix.lower() == GGUF_SUFFIX}
    if not sizes or any(file.suffix == WEIGHT_SUFFIX for file in files):
        return DirectorySource(path, selection)
    return GgufSource(path / choose_gguf(sizes, str(path), "name the file, or choose one with --include"), converter)


def _refuse_patterns(text: str, selection: Selection) -> None:
    if selection != ALL:
        raise InvalidRequest(
            f"{text} is one file: there is nothing that patterns could choose",
            reason="INVALID_PATTERN",
            metadata={"param": "include"},
        )


def _invalid(message: str) -> InvalidRequest:
    return InvalidRequest(message, reason="INVALID_SOURCE", metadata={"param": "source"})
