"""Asks for a model's modules, in a process of its own that has a deadline; keeps what it answered, in memory.

A plan is a function of config.json, which is a blob: its hash is the key. Plans are a few kilobytes, asked for by
people and tools, and made again within seconds, so nothing of them is stored.
"""

import asyncio
import json
import sys
from asyncio.subprocess import PIPE
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import structlog

from helios.registry import offload
from helios.registry.sources.conversion import end_process, environment_of

log = structlog.get_logger()

_MODULE: Final = "helios.registry.profiles.empty_weights"
_KEPT: Final = 256
# A plan of a hundred layers has some ten kilobytes; a model that prints more is up to something.
_MAX_BYTES: Final = 8 << 20


@dataclass(frozen=True, slots=True)
class Plan:
    """A model's modules, each with its bytes at the type that its config names."""

    model_class: str
    no_split_classes: tuple[str, ...]
    blocks: tuple[tuple[str, int], ...]
    others: tuple[tuple[str, int], ...]
    tied: tuple[tuple[str, ...], ...]
    total_bytes: int


class Planner:
    """Makes plans, one at a time: each takes a core and half a gigabyte for some seconds."""

    def __init__(self, *, timeout_seconds: float, module: str = _MODULE) -> None:
        """Takes the time that one may take, and what ``python -m`` runs; tests put another one there."""
        self._timeout_seconds = timeout_seconds
        self._module = module
        self._plans: OrderedDict[str, Plan] = OrderedDict()
        self._free = asyncio.Semaphore(1)

    async def plan(self, config_hash: str, config: bytes) -> Plan | str:
        """Returns the plan of a model, by the content of its config.json and that one's hash; else why there is none.

        Cancel-safe: the process is gone when this returns or raises. What failed is tried again when asked for again.
        """
        async with self._free:
            if config_hash in self._plans:
                self._plans.move_to_end(config_hash)
                return self._plans[config_hash]
            with TemporaryDirectory(prefix="helios-plan-") as directory:
                found = await self._ask(Path(directory), config)
            if isinstance(found, str):
                log.info("no plan of a model", config=config_hash, error=found)
                return found
            self._plans[config_hash] = found
            while len(self._plans) > _KEPT:
                self._plans.popitem(last=False)
            return found

    async def _ask(self, directory: Path, config: bytes) -> Plan | str:
        path = directory / "config.json"
        await offload.run(lambda _: path.write_bytes(config))
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-m", self._module, str(path),
            stdin=PIPE, stdout=PIPE, stderr=asyncio.subprocess.DEVNULL, start_new_session=True,
            env=environment_of(directory), limit=_MAX_BYTES,
        )  # fmt: skip
        try:
            async with asyncio.timeout(self._timeout_seconds):
                assert process.stdout is not None
                line = await process.stdout.readline()
                await process.wait()
        except TimeoutError:
            return f"it took longer than {self._timeout_seconds:g} s"
        except ValueError:
            return "the model has too many modules"
        finally:
            await offload.uninterrupted(end_process(process))
        return _read(line, process.returncode)


def _read(line: bytes, status: int | None) -> Plan | str:
    try:
        found: dict[str, Any] = json.loads(line)
    except ValueError:
        return f"the process that was to make it ended with status {status}"
    if "error" in found:
        return str(found["error"])
    return Plan(
        model_class=found["model_class"],
        no_split_classes=tuple(found["no_split_classes"]),
        blocks=tuple((name, size) for name, size in found["blocks"]),
        others=tuple((name, size) for name, size in found["others"]),
        tied=tuple(map(tuple, found["tied"])),
        total_bytes=found["total_bytes"],
    )
