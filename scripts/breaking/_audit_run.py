"""What a run's end has left: looked for in its folder and among the processes."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from forgejax.pool.journal import Journal
from forgejax.pool.schema import sqlite_url
from forgejax.report.storage import CHECKSUMS_FILE

MARK = "FORGEJAX_BREAK_RUNS"  # in the environment of every process of a campaign: its root
NAME = "broken"
GROUPS_PER_STEP = 2
ORPHANS_S = 5.0


def find_marked(root: Path, word: str = "") -> list[int]:
    """The processes beside this one that a run under ``root`` has left or has, with this word in their command line."""
    found, mark = [], f"{MARK}={root}".encode()
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            marked = int(path.name) != os.getpid() and mark in (path / "environ").read_bytes().split(b"\0")
            if marked and word in (path / "cmdline").read_text(errors="replace"):
                found.append(int(path.name))
    return found


def audit(root: Path, *, ended: bool, spared: Collection[int] = ()) -> Iterator[str]:
    """What is wrong with the run after an end; ``ended``: in an orderly way, so that there is a summary.

    ``spared``: processes that may be left.
    """
    deadline = time.monotonic() + ORPHANS_S
    while (left := set(find_marked(root)) - set(spared)) and time.monotonic() < deadline:
        time.sleep(0.05)
    if left:
        yield f"{len(left)} processes are left: {describe(left)}"
    if not (root / NAME / "journal.sqlite").exists():
        return
    with contextlib.closing(Journal.open(sqlite_url(root / NAME / "journal.sqlite"))) as journal:
        groups, consumed = journal.groups(), journal.consumption()
    states = Counter(group.state for group in groups)
    if [group.index for group in groups] != list(range(len(groups))):
        yield "indices are missing"
    if states["failed"] or (ended and states["dispatched"]):
        yield f"groups are lost: {dict(states)}, {Counter(group.reason for group in groups if group.reason)}"
    if len({record.index for record in consumed}) != len(consumed):
        yield "a group is consumed twice"
    if ended:
        sizes = Counter(record.step for record in consumed if record.kind == "taken")
        yield from _audit_figures(root / NAME, sizes)


def _audit_figures(run: Path, sizes: Counter[int]) -> Iterator[str]:
    summary = json.loads((run / "summary.json").read_text())
    steps, rows = summary["steps"], trained_rows(run)
    if sorted(rows) != list(range(1, steps + 1)):
        yield f"the rows of {steps} steps are {rows[:3]}...{rows[-3:]} ({len(rows)})"
    if set(sizes) != set(range(steps)) or not set(sizes.values()) <= set(range(1, GROUPS_PER_STEP + 1)):
        yield f"{steps} steps have the groups {sizes.most_common(3)} of {len(sizes)} batches"
    groups_open = summary["groups_dispatched"] - summary["groups_trained"] - sum(summary["groups_not_trained"].values())
    for name, value in {
        "open tokens": summary["account_open_tokens"],
        "open groups": groups_open,
        "drift": summary["drift_tokens"],
    }.items():
        if value:
            yield f"{value} {name}: {summary['tokens_not_trained']}, {summary['groups_not_trained']}"


def list_unfinished(run: Path) -> set[tuple[str, int]]:
    """Checkpoints that are being written, or whose writing was cut short: names and inodes."""
    found = set()
    for path in (run / "checkpoints").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError):  # it is whole by now, and has another name
            if not (path / CHECKSUMS_FILE).is_file():
                found.add((path.name, path.stat().st_ino))
    return found


def trained_rows(run: Path) -> list[int]:
    lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
    rows: list[dict[str, Any]] = [json.loads(line) for line in lines if line.endswith("}")]
    return [row["step"] for row in rows if "learner/loss" in row]


def last_row(run: Path) -> int:
    return max(trained_rows(run), default=0)


def describe(process_ids: Collection[int]) -> list[str]:
    told = []
    for process_id in process_ids:
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{process_id}/cmdline").read_text(errors="replace").replace("\0", " ")
            told.append(f"{process_id} {command[:120]}")
    return told
