"""The training steps of a run, on its live display."""

from __future__ import annotations

from forgejax.report.live.progress import Progress
from forgejax.report.names import EVALUATION, STEP
from forgejax.report.sinks.base import Row


class Terminal:
    """Shows each training step; what evaluations found is told by a note of its own. The display stays its owner's."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def write(self, row: Row) -> None:
        if any(not name.startswith(EVALUATION) for name in row.values):
            self._progress.step({STEP: row.step, **row.values})

    def close(self) -> None: ...
