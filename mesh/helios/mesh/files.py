"""Files that must survive: secrets, never seen by others nor half written; names that outlive a power cut."""

import os
import secrets
from pathlib import Path


def write_private(path: Path, content: bytes) -> None:
    """Replaces a file (mode 0600) by one rename, after its bytes are on the disk. Blocking; raises OSError."""
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(6)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        # A full disk must not be filled further by what could not be written.
        temporary.unlink(missing_ok=True)


def sync_directory(directory: Path) -> None:
    """Makes a directory's names durable: a file that was synced may still lose its own. Blocking; raises OSError."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
