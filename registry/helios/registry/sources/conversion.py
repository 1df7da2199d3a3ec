"""Runs the converter (``helios.registry.convert``) in a process of its own and follows it.

torch and transformers take 9 seconds and a gigabyte, and may die on a hostile file: none of that may happen to the
registry. The process leads its own group, which is killed when the caller goes away, when the time is over, and
(through its standard input, a pipe that ends with the registry) when the registry dies.

Its environment is written here rather than inherited: the same file must give the same bytes.
"""

import asyncio
import contextlib
import importlib.metadata
import json
import os
import shutil
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import structlog

from helios.mesh.errors import Bug, DeadlineExceeded, HeliosError, Unavailable
from helios.registry import offload
from helios.registry.progress import ProgressLog
from helios.registry.records import IngestPhase
from helios.registry.strict_json import malformed

log = structlog.get_logger()

# Raised when convert.py writes other bytes for the same file.
_FORMAT: Final = 1
_MODULE: Final = "helios.registry.convert"
# SIGKILL needs milliseconds; a process in uninterruptible I/O is not waited for.
_END_SECONDS: Final = 10.0
# The end of a traceback; the log is no place for more.
_LOG_BYTES: Final = 4096


class Converter:
    """Starts one converter process for each conversion."""

    def __init__(self, *, timeout_seconds: float, require_space: Callable[[int], None], module: str = _MODULE) -> None:
        """Takes the time that one conversion may take, and a check to make before it writes its output.

        Args:
            timeout_seconds: After this the process is killed.
            require_space: Called with the bytes that will be written; raises DiskFull.
            module: What ``python -m`` runs; tests put a slow one here.
        """
        self._timeout_seconds = timeout_seconds
        self._require_space = require_space
        self._module = module
        # Other versions of these may write other bytes.
        versions = [f"{name}-{_version(name)}" for name in ("transformers", "gguf")]
        self.version = " ".join([f"helios-{_FORMAT}", *versions])

    async def convert(self, source: Path, target: Path, progress: ProgressLog) -> None:
        """Converts a GGUF file to a model directory. Cancel-safe: the process is gone when this returns or raises.

        Args:
            source: The file.
            target: An empty directory; on failure what is in it is of no use.
            progress: Gets the phase's total and its advance.

        Raises:
            InvalidRequest: UNSUPPORTED_FORMAT, the file is damaged or of a kind that can't be converted.
            DiskFull: There is no room for the output.
            DeadlineExceeded: It took too long.
            Unavailable: CONVERTER_KILLED, the system killed it (most often: out of memory).
        """
        scratch = target / ".scratch"
        scratch.mkdir()
        output = scratch / "stderr.log"
        with output.open("wb") as stderr:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-P", "-m", self._module, str(source), str(target),
                stdin=PIPE, stdout=PIPE, stderr=stderr, start_new_session=True, env=environment_of(scratch),
            )  # fmt: skip
        try:
            async with asyncio.timeout(self._timeout_seconds):
                failure = await self._follow(process, progress)
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"the conversion took longer than {self._timeout_seconds:g} s", reason="CONVERSION_TIMEOUT"
            ) from error
        finally:
            await offload.uninterrupted(end_process(process))
        if failure is not None:
            raise failure
        if process.returncode == -signal.SIGKILL:
            raise Unavailable(
                "the converter was killed, most likely for want of memory",
                reason="CONVERTER_KILLED",
                retry_after_seconds=60,
            )
        if process.returncode:
            log.error("converter failed", status=process.returncode, output=_tail(output))
            raise Bug(f"the converter failed with status {process.returncode}; the registry's log has its output")
        await offload.run(lambda _: shutil.rmtree(scratch))

    async def _follow(self, process: Process, progress: ProgressLog) -> HeliosError | None:
        """Reads what the converter reports until it ends, or until it reports an error, which is returned."""
        assert process.stdout is not None
        async for line in process.stdout:
            try:
                failure = self._handle(json.loads(line), progress)
            except ValueError as error:
                raise Bug(f"the converter wrote {line[:100]!r}, which is no report") from error
            if failure is not None:
                return failure
        await process.wait()
        return None

    def _handle(self, event: Any, progress: ProgressLog) -> HeliosError | None:
        """Acts on one line of the converter's output; returns the error that it reports."""
        match event:
            case {"output_bytes": int(total)}:
                try:
                    self._require_space(total)
                except HeliosError as error:
                    return error
                progress.begin(IngestPhase.CONVERT, total)
            case {"advance_bytes": int(count)}:
                progress.advance(count)
            case {"error": str(message)}:
                return malformed(message)
        return None


def environment_of(scratch: Path) -> dict[str, str]:
    """Returns the whole environment of a process that reads what may be hostile, with room for files of its own.

    PYTHONPATH is this process's, so that both run the same code; scratch files of libraries go to the workspace.
    """
    return {
        "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
        "PYTHONHASHSEED": "0",
        "PATH": os.defpath,
        "LANG": "C.UTF-8",
        "HOME": str(scratch),
        "TMPDIR": str(scratch),
        "HF_HOME": str(scratch),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        # Dequantising is numpy in one thread; more would only take cores from replicas.
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def _tail(path: Path) -> str:
    return path.read_bytes()[-_LOG_BYTES:].decode("utf-8", "replace")


async def end_process(process: Process) -> None:
    """Kills the process's group, whoever is left in it, and reaps the process."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    if process.stdin is not None:
        process.stdin.close()
    try:
        # asyncio's wait also wants the ends of the pipes, which whoever left the group may still hold.
        async with asyncio.timeout(_END_SECONDS):
            await process.wait()
    except TimeoutError:
        log.warning("converter was killed, its pipes stay open", pid=process.pid)


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "none"
