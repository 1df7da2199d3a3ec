"""``python -m helios.registry.convert FILE.gguf DIRECTORY``: a GGUF file as bf16 safetensors, tokenizer and config.

The registry starts it; it is the only code of the registry that imports torch and transformers. transformers maps
names and dequantises (llama.cpp's own conversion goes the other way only). Standard output carries one JSON object a
line: ``{"output_bytes": n}`` after the inspection, ``{"advance_bytes": n}`` while converting, ``{"error": message}``
when the file is at fault. Standard input is the lifeline: it ends with the registry, and so does this process.

The output is a function of the file and of the versions of transformers and gguf: no time, path or machine gets in.
"""

import functools
import json
import os
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final, NoReturn, TextIO

# What the libraries raise for files that are damaged or not known to them.
_FILE_ERRORS: Final = (
    ValueError, KeyError, IndexError, TypeError, AttributeError, NotImplementedError, OverflowError, RuntimeError,
    AssertionError,
)  # fmt: skip
_BF16_BYTES: Final = 2
# How this conversion happened to load the tokenizer; it says nothing about the tokenizer.
_NOISE: Final = ("is_local", "local_files_only", "name_or_path")


class _Refused(Exception):
    """The file can't be converted; the text is for people."""


def main(arguments: list[str]) -> int:
    """Converts; returns the exit status."""
    source, target = Path(arguments[0]), Path(arguments[1])
    reports = _take_stdout()
    follow_parent()
    try:
        reader = read_gguf(source)
        _report(reports, output_bytes=inspect(source, reader))
        _share(reader)
        convert(source, target, reports)
    except _Refused as error:
        _report(reports, error=str(error)[:1000])
        return 1
    return 0


def read_gguf(source: Path) -> Any:
    """Reads a file's header, with gguf's reader because it is llama.cpp's own. Raises _Refused."""
    # Late, as all imports here: a file that is refused does not pay for the ones that come later.
    from gguf import GGUFReader  # noqa: PLC0415

    try:
        return GGUFReader(source)
    except _FILE_ERRORS as error:
        raise _Refused(f"{source.name} is damaged or cut short: {error}") from error


def inspect(source: Path, reader: Any) -> int:
    """Checks that a file holds all that a model needs; returns the bytes that its tensors will take."""
    size = source.stat().st_size
    for tensor in reader.tensors:
        if tensor.data_offset + int(tensor.n_bytes) > size:
            raise _Refused(f"{source.name} is cut short: tensor {tensor.name} ends beyond the file")
    for key in ("general.architecture", "tokenizer.ggml.model"):
        if key not in reader.fields:
            raise _Refused(f"{source.name} lacks {key}; a model with its tokenizer is needed")
    if not reader.tensors:
        raise _Refused(f"{source.name} holds no tensors")
    if "split.count" in reader.fields and int(reader.fields["split.count"].contents()) > 1:
        raise _Refused(f"{source.name} is one part of several; merge them with llama-gguf-split --merge")
    return sum(int(tensor.n_elements) for tensor in reader.tensors) * _BF16_BYTES


def convert(source: Path, target: Path, reports: TextIO) -> None:
    """Writes the model directory."""
    import torch  # noqa: PLC0415
    from transformers import (  # noqa: PLC0415
        AutoModelForCausalLM,
        AutoTokenizer,
        GgufConfig,
        modeling_gguf_pytorch_utils,
    )

    def follow(tensors: Iterable[Any], **_: Any) -> Iterator[Any]:
        for tensor in tensors:
            yield tensor
            _report(reports, advance_bytes=int(tensor.n_elements) * _BF16_BYTES)

    # transformers wraps its loop over the tensors in a progress bar; this is the bar.
    if hasattr(modeling_gguf_pytorch_utils, "tqdm"):
        modeling_gguf_pytorch_utils.tqdm = follow
    torch.set_num_threads(1)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source.parent,
            gguf_file=source.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
            local_files_only=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name, local_files_only=True)
    except (MemoryError, OSError):
        raise
    except Exception as error:  # tokenizers raises Exception itself; no list of types would be complete
        raise _Refused(f"{source.name} can't be converted: {error}") from error
    # The weights are plain now; what is left of the quantisation would make saving refuse.
    for name in ("hf_quantizer", "is_quantized"):
        if name in vars(model):
            delattr(model, name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    _clean_tokenizer_config(target / "tokenizer_config.json")


def _share(reader: Any) -> None:
    """Lets transformers use the header that was read.

    It would read it three more times, and build its map of tensor names once for every module of the model:
    together two thirds of the time of a small model's conversion.
    """
    import gguf  # noqa: PLC0415

    shared = functools.cache(gguf.get_tensor_name_map)
    vars(gguf).update(GGUFReader=lambda *_: reader, get_tensor_name_map=shared)


def _clean_tokenizer_config(path: Path) -> None:
    content = json.loads(path.read_text())
    for key in _NOISE:
        content.pop(key, None)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True) + "\n")


def _take_stdout() -> TextIO:
    """Returns a stream to the real standard output; whatever libraries print goes to standard error."""
    own = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return own


def _report(reports: TextIO, **event: object) -> None:
    print(json.dumps(event), file=reports)


def follow_parent() -> None:
    """Has this process end with the one that holds its standard input open."""

    def wait() -> NoReturn:
        while os.read(0, 4096):
            pass
        os._exit(3)

    threading.Thread(target=wait, name="lifeline", daemon=True).start()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
