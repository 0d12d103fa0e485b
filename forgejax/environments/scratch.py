"""Temporary folders that go with their process, or when another one begins.

Each process has one folder of its own below the system's for temporary files, with a file in it that it holds locked
for as long as it lives. The system lets go of the lock however it dies, so a folder whose lock can be taken has no
owner any more: the next process to make one removes it.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import os
import shutil
import tempfile
import threading
from pathlib import Path

_PREFIX = "forgejax-"
_LOCK = "owner.lock"
_making = threading.Lock()
_roots: dict[tuple[int, str], Path] = {}  # by process, for a fork owns nothing, and by place


def make_scratch(name: str) -> Path:
    """A new and empty folder, whose maker removes it; blocks. Raises OSError where it cannot be made."""
    with _making:
        key = (os.getpid(), tempfile.gettempdir())
        if key not in _roots or not _roots[key].is_dir():
            remove_orphans(Path(key[1]))
            _roots[key] = _make_root()
        return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=_roots[key]))


def remove_orphans(place: Path) -> None:
    """Removes what dead processes of this user have left there. What cannot be removed stays for the next try."""
    for root in place.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # it is another user's, has no lock, or went meanwhile
            held = _lock(root / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
            try:
                if root.lstat().st_uid == os.getuid():
                    shutil.rmtree(root, ignore_errors=True)
            finally:
                os.close(held)


def _make_root() -> Path:
    while True:
        root = Path(tempfile.mkdtemp(prefix=_PREFIX))
        with contextlib.suppress(BlockingIOError, FileNotFoundError):  # another one took it for an orphan
            held = _lock(root / _LOCK, os.O_RDWR | os.O_CREAT)
            if (root / _LOCK).stat().st_ino == os.fstat(held).st_ino:
                atexit.register(_remove, root, os.getpid())
                return root  # the lock is held until the process ends


def _lock(file: Path, flags: int) -> int:
    """Opens and locks a file. Raises OSError where it is not there or locked by another process."""
    opened = os.open(file, flags, 0o600)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(opened)
        raise
    return opened


def _remove(root: Path, process_id: int) -> None:
    if os.getpid() == process_id:
        shutil.rmtree(root, ignore_errors=True)
