"""Files that are written whole or not at all, folders whose damage is noticed; a full disk is one clear sentence."""

import errno
import json
import os
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from forgejax.errors import ConfigError, StorageFullError

CHECKSUMS_FILE = "checksums.json"
_CHUNK = 2**22
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


def write_checksums(folder: Path) -> None:
    """Keeps size and CRC-32 of every file below a folder that is complete, in ``CHECKSUMS_FILE`` there.

    Raises StorageFullError or ConfigError.
    """
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    with storage_errors(folder), ThreadPoolExecutor(4) as threads:
        sums = dict(zip(names, threads.map(lambda name: _sum(folder / name), names), strict=True))
    write_atomic(folder / CHECKSUMS_FILE, json.dumps(sums, indent=1).encode())


def find_damage(folder: Path) -> str | None:
    """In what a folder differs from its checksums, as half a sentence; None where each file is as it was written."""
    try:
        sums = json.loads((folder / CHECKSUMS_FILE).read_bytes())
        expected = {str(name): (int(size), int(checksum)) for name, (size, checksum) in sums.items()}
    except FileNotFoundError:
        return f"it has no {CHECKSUMS_FILE}: it was never complete, or another program wrote it"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"its {CHECKSUMS_FILE} cannot be read ({error})"

    def check(name: str) -> str | None:
        try:
            found = _sum(folder / name)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if found[0] != expected[name][0]:
            return f"{name} has {found[0]} bytes, expected {expected[name][0]}"
        return None if found == expected[name] else f"{name} does not match its checksum"

    with ThreadPoolExecutor(4) as threads:
        return next(filter(None, threads.map(check, expected)), None)


def _sum(path: Path) -> tuple[int, int]:
    """Size and CRC-32 of a file."""
    size = checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            size, checksum = size + len(chunk), zlib.crc32(chunk, checksum)
    return size, checksum
