"""A directory as hubs lay it out: config.json, safetensors, a tokenizer.

Only files that are known to belong to a model are taken, from the top level (and what Sentence Transformers keep one
below, which says how a model's vectors are made of its tokens): everything else (notebooks, other formats,
code) is left where it is and named in the log. Pickles run code when they are loaded, so they are never taken. A
symbolic link may not lead out of the directory: what it points at is not what the user named.
"""

import fnmatch
import stat
from functools import partial
from pathlib import Path
from typing import Final

from helios.mesh.errors import InvalidRequest
from helios.registry import offload
from helios.registry.inspection import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CONFIG,
    INDEX,
    WEIGHT_SUFFIX,
    inspect_model,
    read_index,
    select_weights,
)
from helios.registry.manifest import MAX_ENTRIES, MEDIA_CONFIG, MEDIA_DOCUMENT, MEDIA_WEIGHT, check_path
from helios.registry.progress import ProgressLog
from helios.registry.records import IngestPhase
from helios.registry.sources.patterns import ALL, Selection
from helios.registry.sources.source import FileSet, SourceFile
from helios.registry.strict_json import malformed

CONFIG_NAMES: Final = (
    CONFIG, INDEX, "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model",
    "sentencepiece.bpe.model", "tekken.json", "*.tiktoken", "chat_template.jinja", "chat_template.json",
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "quantize_config.json",
    "hf_quant_config.json",
    # Sentence Transformers' description of a model that makes vectors.
    "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json",
)  # fmt: skip
_DOCUMENTS: Final = ("LICENSE*", "NOTICE*", "USE_POLICY*", "README.md")
_PICKLES: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# Any one of these sets of files is a tokenizer.
_TOKENIZERS: Final = (
    ("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"), ("vocab.txt",), ("tekken.json",),
    ("spiece.model",), ("sentencepiece.bpe.model",), ("*.tiktoken",),
)  # fmt: skip


class DirectorySource:
    """A directory with a model in safetensors."""

    is_file = False

    def __init__(self, directory: Path, selection: Selection = ALL) -> None:
        self._directory = directory
        self._selection = selection
        self.origin = f"dir:{directory}"

    async def fingerprint(self, expected_sha256: str, progress: ProgressLog) -> None:
        """Nothing is converted, and only reading it all tells what it is."""
        del expected_sha256
        progress.begin(IngestPhase.INSPECT)

    async def files(self, workspace: Path, progress: ProgressLog) -> FileSet:
        """Returns the model's files after checking that they are a complete model."""
        del workspace
        progress.begin(IngestPhase.INSPECT)
        return await offload.run(partial(_inspect, self._directory, self._selection))


def scan_directory(directory: Path, *, is_owned: bool, selection: Selection = ALL) -> FileSet:
    """Lists and checks the files of a model directory that are wanted. Blocking.

    Raises:
        InvalidRequest: UNSUPPORTED_FORMAT, INVALID_SOURCE (a link that leads out).
    """
    has_config = (directory / CONFIG).exists() and selection.takes(CONFIG)
    if (directory / ADAPTER_CONFIG).exists() and not has_config:
        return _scan_adapter(directory, is_owned=is_owned)
    candidates: list[SourceFile] = []
    ignored: list[tuple[str, str]] = []
    root = directory.resolve()
    for location in sorted(directory.iterdir()):
        kind = media_type(location.name)
        if not selection.takes(location.name):
            ignored.append((location.name, "left out by the patterns"))
        elif kind is None:
            ignored.append((location.name, _why_ignored(location)))
        else:
            candidates.append(_check_file(location, location.name, root, kind))
    candidates += [file for file in _module_files(directory, root) if selection.takes(file.path)]
    if len(candidates) > MAX_ENTRIES:
        raise malformed(f"the directory holds more than {MAX_ENTRIES} files of a model")
    names = {file.path for file in candidates}
    _require_parts(names, ignored)
    index = next((file.location for file in candidates if file.path == INDEX), None)
    weights = select_weights(names, None if index is None else read_index(index))
    files = [file for file in candidates if not file.path.endswith(WEIGHT_SUFFIX) or file.path in weights]
    ignored += [(name, "not part of the model") for name in sorted(names - {file.path for file in files})]
    return FileSet(tuple(files), is_owned=is_owned, ignored=tuple(ignored))


def media_type(name: str) -> str | None:
    """Returns what a file of this name is to a model; None where it does not belong to one."""
    if name.endswith(WEIGHT_SUFFIX):
        return MEDIA_WEIGHT
    if any(fnmatch.fnmatchcase(name, pattern) for pattern in CONFIG_NAMES):
        return MEDIA_CONFIG
    if any(fnmatch.fnmatchcase(name, pattern) for pattern in _DOCUMENTS):
        return MEDIA_DOCUMENT
    return None


def _scan_adapter(directory: Path, *, is_owned: bool) -> FileSet:
    """Lists and checks the files of a LoRA adapter as PEFT writes it: two, whatever else lies beside them."""
    wanted = {ADAPTER_CONFIG: MEDIA_CONFIG, ADAPTER_WEIGHTS: MEDIA_WEIGHT}
    if not (directory / ADAPTER_WEIGHTS).exists():
        raise malformed(f"{ADAPTER_WEIGHTS} is missing: an adapter's directory has it and {ADAPTER_CONFIG}")
    root = directory.resolve()
    files = tuple(_check_file(directory / name, name, root, kind) for name, kind in wanted.items())
    others = sorted(location for location in directory.iterdir() if location.name not in wanted)
    ignored = tuple((location.name, _why_ignored(location)) for location in others)
    return FileSet(files, is_owned=is_owned, ignored=ignored)


def _inspect(directory: Path, selection: Selection, stop: offload.Stop) -> FileSet:
    try:
        found = scan_directory(directory, is_owned=False, selection=selection)
        stop.check()
        inspect_model({file.path: file.location for file in found.files})
    except OSError as error:
        raise _invalid(f"{directory} can't be read: {error.strerror} ({error.filename})") from error
    return found


def _module_files(directory: Path, root: Path) -> list[SourceFile]:
    """Returns the configurations of a Sentence Transformer's modules, such as ``1_Pooling/config.json``."""
    found = []
    for location in sorted(directory.glob(f"[0-9]*_*/{CONFIG}")):
        if any(location.parent.glob(f"*{WEIGHT_SUFFIX}")):
            # Left out, the model would make other vectors.
            raise malformed(f"{location.parent.name} has weights of its own, which is not supported")
        found.append(_check_file(location, f"{location.parent.name}/{CONFIG}", root, MEDIA_CONFIG))
    return found


def _check_file(location: Path, path: str, root: Path, media_type: str) -> SourceFile:
    check_path(path)
    try:
        target = location.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise _invalid(f"{path} is a link that leads nowhere") from error
    if not target.is_relative_to(root):
        raise _invalid(
            f"{path} is a link that leads out of the directory; copy the directory with 'cp -rL' and ingest the copy"
        )
    status = target.stat()
    if not stat.S_ISREG(status.st_mode):
        raise _invalid(f"{path} is not a regular file")
    return SourceFile(path, target, status.st_size, media_type)


def _why_ignored(location: Path) -> str:
    if location.suffix in _PICKLES:
        return "pickles run code when they are loaded; only safetensors are taken"
    return "a directory" if location.is_dir() else "not known to belong to a model"


def _require_parts(names: set[str], ignored: list[tuple[str, str]]) -> None:
    if CONFIG not in names:
        raise malformed("config.json is missing: a model directory has config.json, *.safetensors and a tokenizer")
    if not any(name.endswith(WEIGHT_SUFFIX) for name in names):
        pickles = [name for name, _ in ignored if name.endswith(_PICKLES)]
        if pickles:
            raise malformed(
                f"the weights are pickles ({pickles[0]}), which run code when they are loaded;"
                " convert them to safetensors"
            )
        raise malformed("there are no *.safetensors files")
    if not any(all(fnmatch.filter(names, pattern) for pattern in needed) for needed in _TOKENIZERS):
        raise malformed("the tokenizer is missing: tokenizer.json, tokenizer.model, or vocab.json with merges.txt")


def _invalid(message: str) -> InvalidRequest:
    return InvalidRequest(message, reason="INVALID_SOURCE", metadata={"param": "source"})
