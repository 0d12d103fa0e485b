"""The file of a campaign's ends, a JSON line each, which later batches go on with; and the table of it."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

SAVING, EVALUATING = "saving", "evaluating"


@dataclass(frozen=True, kw_only=True)
class Result:
    """One end. ``hit``: what the run was doing when it came, a phase of its own or a save, or both.

    ``closed``: it ended with a summary, whose accounts were looked at; ``audited``: another run was played to its end
    after it for that. ``took_s``: from the signal to the end; ``whole_s``: with all before and the audit. ``wrong``:
    what was found, a sentence each.
    """

    number: int
    what: str
    kind: str
    hit: tuple[str, ...]
    steps: tuple[int, int]
    closed: bool
    took_s: float
    whole_s: float
    commit: str
    wrong: tuple[str, ...]

    def describe(self) -> str:
        steps = f"step {self.steps[0]} -> {self.steps[1]}"
        found = "; ".join(self.wrong) or "all is well"
        return f"{self.number}: {self.kind} while {' and '.join(self.hit)}, in {self.took_s:.1f} s, {steps}: {found}"


def read_results(file: Path) -> list[Result]:
    """What earlier batches have left; nothing where there is no file yet."""
    lines = file.read_bytes().splitlines() if file.exists() else []
    return [msgspec.json.decode(line, type=Result) for line in lines]


def append_result(file: Path, result: Result) -> None:
    with file.open("ab") as lines:
        lines.write(msgspec.json.encode(result) + b"\n")


def lay_table(results: Iterable[Result]) -> Iterator[str]:
    """A row of Markdown for all of a campaign and for each kind of end. An end can hit an evaluation and a save."""
    rows: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        for kind in (result.kind, ""):
            rows.setdefault((result.what, kind), []).append(result)
    columns = ("ends", "number", EVALUATING, SAVING, "else", "account closed", "wrong", "s to the end: median, most")
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"
    for (what, kind), those in sorted(rows.items()):
        took = [result.took_s for result in those]
        counts = (
            len(those),
            sum(EVALUATING in result.hit for result in those),
            sum(SAVING in result.hit for result in those),
            sum(not {EVALUATING, SAVING} & {*result.hit} for result in those),
            sum(result.closed for result in those),
            sum(bool(result.wrong) for result in those),
        )
        cells = [kind or f"**{what}**", *map(str, counts), f"{statistics.median(took):.1f}, {max(took):.1f}"]
        yield f"| {' | '.join(cells)} |"
