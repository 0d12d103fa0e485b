"""Where rows of figures go: one file a sink, all behind one door."""

from pathlib import Path

from forgejax.report.live.progress import Progress
from forgejax.report.sinks.base import Row, Sink, Sinks
from forgejax.report.sinks.jsonl import JsonLines
from forgejax.report.sinks.tensorboard import TensorBoard
from forgejax.report.sinks.terminal import Terminal

__all__ = ["JsonLines", "Row", "Sink", "Sinks", "TensorBoard", "Terminal", "open_sinks"]


def open_sinks(run_dir: Path, progress: Progress, *, resumed_step: int | None = None) -> Sinks:
    """The sinks of a run. ``resumed_step``: see ``JsonLines``. Raises ConfigError and StorageFullError."""
    return Sinks(
        JsonLines(run_dir, resumed_step=resumed_step),
        TensorBoard(run_dir.resolve() / "tensorboard", resumed_step=resumed_step),
        Terminal(progress),
    )
