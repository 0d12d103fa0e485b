"""Writing report files: whole or not at all, and a full disk is one clear sentence."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from forgejax.errors import ConfigError, StorageFullError

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turns an OSError about ``path`` into StorageFullError (no space, no quota) or ConfigError (anything else)."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in _FULL:
            raise StorageFullError(
                f"{path} could not be written: the disk is full ({reason}). Free space under {path.parent} and resume "
                f"the run; what was written before is kept."
            ) from error
        raise ConfigError(
            f"{path} could not be used ({reason}); expected a run directory this user can read and write. "
            f"Choose another run directory or correct its permissions."
        ) from error


def write_atomic(path: Path, data: bytes) -> None:
    """Replaces ``path`` by ``data``: a reader, or a crash, sees the old content or the new, never a part.

    Missing parent folders are made. Raises StorageFullError or ConfigError.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with scratch.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            scratch.replace(path)
        finally:
            scratch.unlink(missing_ok=True)
