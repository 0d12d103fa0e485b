"""The directory of one run: where it is, what lies in it, and the lock that keeps a second trainer out."""

from __future__ import annotations

import fcntl
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from forgejax.errors import ConfigError, RunLockedError
from forgejax.pool.schema import sqlite_url
from forgejax.report.storage import write_atomic

_CONFIG = "config.json"


@dataclass(frozen=True, kw_only=True)
class RunDir:
    """An open run directory, locked by this process until it ends or calls ``close``."""

    path: Path
    lock: TextIO
    resumed: bool

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def journal_url(self) -> str:
        return sqlite_url(self.path / "journal.sqlite")

    @property
    def requests(self) -> Path:
        return self.path / "requests.log"

    @property
    def checkpoints(self) -> Path:
        return checkpoints_of(self.path)

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is a step to go on from; without one the run begins anew in this folder."""
        return self.checkpoints.is_dir() and any(step.name.isdigit() for step in self.checkpoints.iterdir())

    def save_config(self, config: dict[str, Any]) -> None:
        """Keeps the resolved configuration, so that ``--resume`` needs nothing else."""
        write_atomic(self.path / _CONFIG, json.dumps(config, indent=2).encode() + b"\n")

    def close(self) -> None:
        self.lock.close()


def create(root: Path, name: str, stem: str) -> RunDir:
    """A new run: ``root/name``, or ``root/stem-N`` with the next free number where no name is given.

    Raises ConfigError if a run of that name exists or the folder cannot be made.
    """
    path = root / name
    if name and path.exists():
        raise ConfigError(f"there is a run in {path} already; choose another --run.name, or go on with --resume={name}")
    try:
        if name:
            path.mkdir(parents=True)
        else:
            path = _make_numbered(root, stem)
    except OSError as error:
        raise ConfigError(f"the run directory under {root} cannot be made: {error}; set --run.root") from error
    return _lock(path, resumed=False)


def reopen(root: Path, name: str) -> RunDir:
    """An existing run: ``name`` under ``root``, a path, or where empty the newest one. Raises ConfigError."""
    if name:
        path = next((each for each in (root / name, Path(name)) if (each / _CONFIG).is_file()), None)
    else:
        runs = [file.parent for file in root.glob(f"*/{_CONFIG}")]
        path = max(runs, key=lambda run: (run / _CONFIG).stat().st_mtime, default=None)
    if path is None:
        there = ", ".join(sorted(file.parent.name for file in root.glob(f"*/{_CONFIG}"))) or "none"
        raise ConfigError(f"there is no run {name!r} to resume under {root}; runs there: {there}")
    return _lock(path, resumed=True)


def checkpoints_of(path: Path) -> Path:
    """Where the run at ``path`` keeps its checkpoints."""
    return path / "checkpoints"


def saved_config(path: Path) -> dict[str, Any]:
    """What ``save_config`` kept in the run at ``path``, open or not. Raises ConfigError if it is missing or damaged."""
    try:
        saved: dict[str, Any] = json.loads((path / _CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path / _CONFIG} cannot be read: {error}; give the folder of a run") from error
    return saved


def _make_numbered(root: Path, stem: str) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    pattern = re.compile(rf"{re.escape(stem)}-(\d+)")
    taken = [int(match[1]) for each in root.iterdir() if (match := pattern.fullmatch(each.name))]
    number = max(taken, default=0) + 1
    while True:
        try:
            path = root / f"{stem}-{number}"
            path.mkdir()
        except FileExistsError:
            number += 1  # another trainer was quicker
        else:
            return path


def _lock(path: Path, *, resumed: bool) -> RunDir:
    """The lock is the kernel's: it goes with the process, however that ends."""
    lock = (path / "lock").open("a+", encoding="utf-8")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.seek(0)
        holder = lock.read().strip() or "unknown"
        lock.close()
        raise RunLockedError(
            f"another trainer (process {holder}) is at work in {path}; stop it, or start a run of your own"
        ) from error
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return RunDir(path=path, lock=lock, resumed=resumed)
