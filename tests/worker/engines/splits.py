"""Writes the registry's table of how model classes can be split: ``python -m tests.worker.engines.splits``.

What vLLM asks before it starts: of a class of its own whether it implements SupportsPP; of one that it runs through
transformers' code whether the configuration has plans for it. All modules of vLLM's models are imported for that, two
minutes; packages that some of them want and that are not installed here are stood in for, since only the classes count.
A class that can't be imported all the same is not split into stages, as long as nobody knows better.
"""

import importlib.abc
import importlib.machinery
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from tests.worker.engines import architectures

ROOT = Path(__file__).parents[3]
FILE = ROOT / "registry" / "helios" / "registry" / "profiles" / "splits.txt"
STAGES, RANKS = "stages", "ranks"
_MISSING = frozenset({"torchvision", "torchaudio", "timm", "terratorch"})


class _Anything(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls

    def __or__(cls, other: object) -> Any:
        return cls

    __ror__ = __or__


class _Thing(metaclass=_Anything):
    """A class, a function, a decorator: whatever a module of a missing package is asked for."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __call__(self, *arguments: Any, **_: object) -> Any:
        return arguments[0] if arguments else self


class _Module(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Thing


class _StandIn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname: str, path: object, target: object = None) -> importlib.machinery.ModuleSpec | None:
        """Finds what nobody before has found."""
        del path, target
        if fullname.partition(".")[0] not in _MISSING:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        """Makes a module that has everything."""
        module = _Module(spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Runs nothing."""


def own_splits(name: str) -> set[str]:
    """Returns how a class that vLLM's registry names can be split.

    Raises:
        ImportError: It needs what is not to be had here.
    """
    from vllm.model_executor.models.interfaces import supports_pp  # noqa: PLC0415 - ten seconds
    from vllm.model_executor.models.registry import ModelRegistry  # noqa: PLC0415

    # Ranks are what vLLM's layers do for every class; there is no interface for it.
    return {RANKS, STAGES} if supports_pp(ModelRegistry.models[name].load_model_cls()) else {RANKS}


def other_splits(name: str, own: dict[str, set[str]]) -> set[str]:
    """Returns how a class that vLLM runs by other means can be split: converted, or by transformers' plans."""
    import transformers  # noqa: PLC0415 - torch
    from vllm.model_executor.models.registry import ModelRegistry  # noqa: PLC0415 - ten seconds

    settings: Any = SimpleNamespace(runner_type="auto", convert_type="auto")
    if (base := ModelRegistry._normalize_arch(name, settings)) in own:
        return own[base]
    config = getattr(getattr(transformers, name), "config_class", None)
    found = {RANKS: "base_model_tp_plan", STAGES: "base_model_pp_plan"}
    return {split for split, plan in found.items() if getattr(config, plan, None)}


def table() -> dict[str, set[str]]:
    """Returns all that the registry lists, with how each can be split."""
    from vllm.model_executor.models.registry import ModelRegistry  # noqa: PLC0415 - ten seconds

    sys.meta_path.append(_StandIn())
    own: dict[str, set[str]] = {}
    for name in ModelRegistry.models:
        try:
            own[name] = own_splits(name)
        except ImportError as error:
            print(f"{name}: {error}", file=sys.stderr)
            own[name] = {RANKS}
    listed = [line for line in architectures.FILE.read_text().splitlines() if not line.startswith("#")]
    return {name: own[name] if name in own else other_splits(name, own) for name in listed}


def lines() -> list[str]:
    """Returns the table's lines, without the head."""
    return [" ".join([name, *sorted(splits)]) for name, splits in sorted(table().items())]


def main() -> None:
    found = lines()
    import vllm  # noqa: PLC0415 - ten seconds

    FILE.write_text("\n".join([f"# vLLM {vllm.__version__}; written by tests.worker.engines.splits", *found]) + "\n")
    print(len(found), sum(STAGES in line.split() for line in found))


if __name__ == "__main__":
    main()
