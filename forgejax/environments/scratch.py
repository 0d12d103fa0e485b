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
import stat
import tempfile
import threading
import uuid
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
                    _remove_root(root)
            finally:
                os.close(held)


def remove_tree(place: Path) -> None:
    """Removes a file, or a folder and all that is in it, whatever was done there: deep, shut or read-only. Blocks.

    Every folder is moved up before it is emptied, so none lies deeper than a path can name. What cannot be removed
    (it is another user's, or written to meanwhile) stays.
    """
    with contextlib.suppress(OSError):
        if not stat.S_ISDIR(place.lstat().st_mode):
            place.unlink()
            return
        place.chmod(0o700)
        top = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            left = _empty(top, ".")
            while left:
                folder = left.pop()
                left += _empty(top, folder)
                with contextlib.suppress(OSError):
                    os.rmdir(folder, dir_fd=top)
        finally:
            os.close(top)
        place.rmdir()


def _empty(top: int, folder: str) -> list[str]:
    """Removes the files of a folder in ``top`` and moves the folders in it up there; gives their new names."""
    moved: list[str] = []
    with contextlib.suppress(OSError):
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=top)
        try:
            with os.scandir(opened) as entries:
                found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
            for name, is_folder in found:
                with contextlib.suppress(OSError):
                    if not is_folder:
                        os.unlink(name, dir_fd=opened)
                        continue
                    os.chmod(name, 0o700, dir_fd=opened)
                    up = uuid.uuid4().hex
                    os.rename(name, up, src_dir_fd=opened, dst_dir_fd=top)
                    moved.append(up)
        finally:
            os.close(opened)
    return moved


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
    if os.getpid() == process_id and root.exists():
        _remove_root(root)


def _remove_root(root: Path) -> None:
    """The lock goes last: a removal that is cut off is gone on with by the next process."""
    for place in root.iterdir():
        if place.name != _LOCK:
            remove_tree(place)
    remove_tree(root)
