"""NVML's answers, recorded and played back in place of the module ``pynvml``.

A recording is JSON: function → arguments → answer. Handles are names (``gpu0``, ``gpu0/mig1``), structures are objects,
errors are NVML's numbers. ``python -m tests.worker.devices.nvml_recording`` writes one on a machine with GPUs; those
beside this module have the shape of real ones, with made-up serial numbers.
"""

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

RECORDINGS = Path(__file__).with_name("recordings")


class RecordedNvml:
    """Answers as a recording says; constants and errors are the real module's.

    ``answers`` may be changed between calls: that is how a card is lost. A function that a recording does not have is
    not supported by its card.
    """

    def __init__(self, name: str) -> None:
        self.real: Any = importlib.import_module("pynvml")
        self.answers: dict[str, dict[str, Any]] = json.loads((RECORDINGS / f"{name}.json").read_text())
        self.NVMLError = self.real.NVMLError

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("nvml"):
            return getattr(self.real, name)
        # A function that the library does not have must not pass because the recording has it.
        assert callable(getattr(self.real, name))

        def answer(*arguments: Any) -> Any:
            given = self.answers.get(name, {}).get(_key(arguments), {"error": self.real.NVML_ERROR_NOT_SUPPORTED})
            if isinstance(given, dict) and "error" in given:
                raise self.real.NVMLError(given["error"])
            return _structure(given)

        return answer

    def lose(self, handle: str) -> None:
        """From now on every question about a card is answered with "GPU is lost"."""
        for answers in self.answers.values():
            for key in answers:
                if handle in key.split(","):
                    answers[key] = {"error": self.real.NVML_ERROR_GPU_IS_LOST}


class RecordingNvml:
    """The real module, with everything that is asked and answered written down."""

    def __init__(self) -> None:
        self.real: Any = importlib.import_module("pynvml")
        self.answers: dict[str, dict[str, Any]] = {}
        self._names: dict[int, str] = {}
        self._handles: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.real, name)
        return self._wrap(name, value) if name.startswith("nvml") and callable(value) else value

    def _wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def ask(*arguments: Any) -> Any:
            key = _key(tuple(self._names.get(id(argument), argument) for argument in arguments))
            try:
                given = function(*arguments)
            except self.real.NVMLError as error:
                self.answers.setdefault(name, {})[key] = {"error": error.value}
                raise
            self.answers.setdefault(name, {})[key] = self._plain(name, key, given)
            return given

        return ask

    def _plain(self, name: str, key: str, given: Any) -> Any:
        if "Handle" in name:
            self._handles.append(given)
            parent, _, number = key.rpartition(",")
            self._names[id(given)] = f"{parent}/mig{number}" if parent else f"gpu{number}"
            return self._names[id(given)]
        if hasattr(given, "_fields_"):
            return {field: _text(getattr(given, field)) for field, *_ in given._fields_}
        return _text(given)


def _text(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value


def _key(arguments: tuple[Any, ...]) -> str:
    return ",".join(map(str, arguments))


def _structure(given: Any) -> Any:
    if isinstance(given, list) and given and isinstance(given[0], dict):
        return [SimpleNamespace(**entry) for entry in given]
    return SimpleNamespace(**given) if isinstance(given, dict) else given


def main() -> None:
    """Records what the inventory asks on this machine, to standard output."""
    inventory_class = importlib.import_module("helios.worker.devices.nvml").NvmlInventory
    recording = RecordingNvml()
    inventory = inventory_class.open(recording, memory_ratio=1.0)
    if inventory is None:
        sys.exit("there is no GPU here that NVML knows")
    inventory.measure()
    json.dump(recording.answers, sys.stdout, indent=1, sort_keys=True)


if __name__ == "__main__":
    main()
