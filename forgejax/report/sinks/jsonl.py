"""Metrics on disk: one JSON object a row in ``metrics.jsonl``."""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from forgejax.errors import ConfigError
from forgejax.report.names import STEP, TIME
from forgejax.report.sinks.base import NONFINITE, Row
from forgejax.report.storage import storage_errors, write_atomic

METRICS_FILE = "metrics.jsonl"


class JsonLines:
    """Appends rows to ``run_dir/metrics.jsonl``. One thread at a time.

    ``resumed_step`` is the step of the checkpoint that the run goes on from: later rows belong to work that was lost
    and are cut away (``rows_cut``), as are lines that are not rows (``lines_damaged``, a torn last line among them).
    None means a new run, which must not find rows of another.

    Raises ConfigError (an unusable directory, rows of another run) and StorageFullError.
    """

    def __init__(self, run_dir: Path, *, resumed_step: int | None = None) -> None:
        self._path = run_dir.resolve() / METRICS_FILE
        self.rows_cut, self.lines_damaged = _cut(self._path, resumed_step)
        with storage_errors(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered: a row is in the file, whole, when write returns.
            self._file = self._path.open("ab", buffering=0)

    def write(self, row: Row) -> None:
        """Appends one row. NaN and infinities are written as null and named in ``_nonfinite``.

        If the disk is full the file ends with the last whole row and StorageFullError is raised.
        """
        nonfinite = sorted(name for name, value in row.values.items() if not math.isfinite(value))
        record: dict[str, Any] = {STEP: row.step, TIME: round(row.at, 3)}
        record |= {name: value if math.isfinite(value) else None for name, value in row.values.items()}
        if nonfinite:
            record[NONFINITE] = nonfinite
        self._append(json.dumps(record, allow_nan=False).encode() + b"\n")

    def close(self) -> None:
        """Idempotent."""
        self._file.close()

    def _append(self, line: bytes) -> None:
        with storage_errors(self._path):
            end = os.fstat(self._file.fileno()).st_size
            try:
                written = 0
                while written < len(line):
                    written += self._file.write(line[written:])
            except OSError:
                # A part of the row may be in: without this the next row would be glued to it.
                self._file.truncate(end)
                raise


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """The rows of a run in order of step, one a step, ``step`` among their keys; a non-finite value reads as NaN.

    Later rows of a step win name by name. A torn last line, as a live run may show, is passed over. Raises ConfigError
    if there is no such file.
    """
    path = run_dir / METRICS_FILE
    with storage_errors(path):
        content = path.read_bytes()
    steps: dict[int, dict[str, float]] = {}
    for _, record in _rows(content):
        if record is None:
            continue
        row = steps.setdefault(record[STEP], {STEP: record[STEP]})
        row |= {
            name: math.nan if value is None else float(value)
            for name, value in record.items()
            if value is None or isinstance(value, int | float)
        }
    return [steps[step] for step in sorted(steps)]


def _rows(content: bytes) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Each non-empty line with its record, or with None where the line is not a row."""
    for line in content.splitlines():
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        # type() and not isinstance: true is an int.
        valid = isinstance(record, dict) and type(record.get(STEP)) is int
        yield line, record if valid else None


def _cut(path: Path, resumed_step: int | None) -> tuple[int, int]:
    """Leaves the rows up to ``resumed_step``; returns how many later rows and how many damaged lines it cut away."""
    if not path.exists():
        return 0, 0
    with storage_errors(path):
        content = path.read_bytes()
    kept, cut, damaged = [], 0, 0
    for line, record in _rows(content):
        if record is None:
            damaged += 1
        elif resumed_step is not None and record[STEP] > resumed_step:
            cut += 1
        else:
            kept.append(line + b"\n")
    if resumed_step is None and kept:
        raise ConfigError(
            f"{path} already holds {len(kept)} rows of a run; a new run needs a directory of its own. Resume that run, "
            f"choose another run directory, or delete this one."
        )
    repaired = b"".join(kept)
    if repaired != content:
        write_atomic(path, repaired)
    return cut, damaged
