"""The directory of one run: where it is, what lies in it, its history, and the lock that keeps a second trainer out."""

from __future__ import annotations

import datetime
import fcntl
import json
import os
import re
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import msgspec

from forgejax.errors import ConfigError, RunLockedError
from forgejax.pool.schema import sqlite_url
from forgejax.report.storage import storage_errors, write_atomic

_CONFIG = "config.json"
_HISTORY = "history.jsonl"
_JOURNAL = "journal.sqlite"
_ABSENT = object()


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One start of a run or one resume of it.

    ``folder`` is where it was started, which its relative paths begin at; ``tokenizer`` a digest of the tokenizer's
    files. ``changed`` holds the old and the new value of each key that it overrode for good. It went on from ``step``
    (None: it never got there), and ``steps_lost`` steps of the attempt before, which have figures, were done again.
    """

    started_at: str
    folder: str
    host: str
    process: int
    tokenizer: str = ""
    changed: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    step: int | None = None
    steps_lost: int = 0

    def describe(self) -> str:
        """What became of the attempt before, and what is different now, in words."""
        lost = f"{self.steps_lost} steps after it are done again" if self.steps_lost else "no step is lost"
        changes = [f"{key} {_shorten(old)} -> {_shorten(new)}" for key, (old, new) in self.changed.items()]
        return f"from step {self.step or 0}, {lost}; changed: {', '.join(changes) or 'nothing'}"


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
        return sqlite_url(self.path / _JOURNAL)

    @property
    def requests(self) -> Path:
        return self.path / "requests.log"

    @property
    def servers(self) -> Path:
        """What lies of the inference servers that the trainer starts: their logs, and their records of requests."""
        return self.path / "engines"

    @property
    def checkpoints(self) -> Path:
        return checkpoints_of(self.path)

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is a step to go on from; without one the run begins anew in this folder."""
        return self.checkpoints.is_dir() and any(step.name.isdigit() for step in self.checkpoints.iterdir())

    def save_config(self, config: dict[str, Any], tokenizer: str = "") -> None:
        """Begins an attempt: keeps its resolved configuration, so that ``--resume`` needs nothing else, and notes in
        the history what of it is new. Raises StorageFullError or ConfigError."""
        before = saved_config(self.path) if (self.path / _CONFIG).is_file() else None
        write_atomic(self.path / _CONFIG, json.dumps(config, indent=2).encode() + b"\n")
        attempt = Attempt(
            started_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            folder=str(Path.cwd()),
            host=socket.gethostname(),
            process=os.getpid(),
            tokenizer=tokenizer,
            changed={} if before is None else list_changes(before, saved_config(self.path)),
        )
        noted = msgspec.to_builtins(attempt)
        self._note({key: noted[key] for key in ("started_at", "folder", "host", "process", "tokenizer", "changed")})

    def note_restored(self, step: int, steps_lost: int) -> None:
        """Notes in the history where this attempt goes on from. Raises StorageFullError or ConfigError."""
        self._note({"step": step, "steps_lost": steps_lost})

    def _note(self, entry: dict[str, Any]) -> None:
        path = self.path / _HISTORY
        with storage_errors(path), path.open("a+b") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
            torn = file.read(1) not in (b"", b"\n")
            file.write(b"\n" * torn + json.dumps(entry).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        self.lock.close()


def create(root: Path, name: str, stem: str) -> RunDir:
    """A new run: ``root/name``, or ``root/stem-N`` with the next free number where no name is given.

    Raises ConfigError if a run of that name exists or the folder cannot be made.
    """
    if "?" in str(root.absolute()):
        raise ConfigError(f"no journal can lie in {root.absolute()}, for the ? in its name; set --run.root")
    path, stem = root / name, re.sub(r"[^\w.+=@-]", "-", stem)
    if name and path.exists():
        raise ConfigError(f"there is a run in {path} already; choose another --run.name, or go on with --resume={path}")
    try:
        if name:
            path.mkdir(parents=True)
        else:
            path = _make_numbered(root, stem)
    except OSError as error:
        raise ConfigError(f"the run directory under {root} cannot be made: {error}; set --run.root") from error
    return _lock(path, resumed=False)


def find_run(root: Path, name: str) -> Path:
    """An existing run: ``name`` under ``root``, a path, or where empty the newest one. Raises ConfigError."""
    if name:
        path = next((each for each in (root / name, Path(name)) if (each / _CONFIG).is_file()), None)
    else:
        runs = [file.parent for file in root.glob(f"*/{_CONFIG}")]
        path = max(runs, key=lambda run: (run / _CONFIG).stat().st_mtime, default=None)
    if path is None:
        there = ", ".join(sorted(file.parent.name for file in root.glob(f"*/{_CONFIG}"))) or "none"
        raise ConfigError(
            f"there is no run {name!r} to resume under {root}; runs there: {there}; give its folder, as "
            "--resume=path/to/run, or where it lies with --run.root"
        )
    return path.absolute()


def reopen(root: Path, name: str) -> RunDir:
    """The run that ``find_run`` finds. Raises ConfigError where it cannot be written to or has lost its journal too."""
    path = find_run(root, name)
    place = _lock(path, resumed=True)
    if place.has_checkpoint and not (path / _JOURNAL).is_file():
        place.close()
        raise ConfigError(
            f"{path} has checkpoints and no {_JOURNAL}, which knows what they were trained on; bring that file back "
            "from a copy, or start a new run"
        )
    return place


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


def read_history(path: Path) -> list[Attempt]:
    """The attempts at the run at ``path``, the first one first; none where nothing was noted.

    A line that is damaged, or was torn by a crash, is passed over. Raises ConfigError where the file cannot be read.
    """
    file = path / _HISTORY
    if not file.exists():
        return []
    with storage_errors(file):
        lines = file.read_bytes().splitlines()
    attempts: list[dict[str, Any]] = []
    for line in lines:
        entry = _read_entry(line)
        if "started_at" in entry:
            attempts.append(entry)
        elif attempts:
            attempts[-1] |= entry
    return [msgspec.convert(attempt, Attempt) for attempt in attempts]


def list_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Each key of nested plain data whose value is another one, dotted, with both. Keys on one side alone are none."""
    old, new = (dict(_flatten(json.loads(json.dumps(each)), "")) for each in (before, now))
    return {key: (old[key], new[key]) for key in new if old.get(key, _ABSENT) not in (_ABSENT, new[key])}


def _flatten(data: Mapping[str, Any], place: str) -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{place}{key}.")
        else:
            yield f"{place}{key}", value


def _read_entry(line: bytes) -> dict[str, Any]:
    """A line of the history that can be relied on, or nothing."""
    try:
        entry = json.loads(line)
        if "started_at" not in entry:
            return {"step": int(entry["step"]), "steps_lost": int(entry["steps_lost"])}
        msgspec.convert(entry, Attempt)
    except (ValueError, TypeError, KeyError, msgspec.ValidationError):
        return {}
    kept: dict[str, Any] = entry
    return kept


def _shorten(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


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
    try:
        lock = (path / "lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"the run in {path} cannot be written to: {error}; correct its permissions, or copy it to another folder "
            "and resume it there"
        ) from error
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
