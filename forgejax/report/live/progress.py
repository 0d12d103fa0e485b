"""Live progress of a run: one Protocol, a panel for terminals, plain lines for everything else."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Literal, Protocol, SupportsFloat, TextIO

from forgejax.report.live.lines import LinesProgress

ProgressStyle = Literal["auto", "panel", "lines", "none"]


class Progress(Protocol):
    """What the run tells as it goes. No method waits on the reader of the output, and none fails because it is gone."""

    def phase(self, name: str, detail: str = "") -> AbstractContextManager[None]:
        """The time inside is this phase (installing, compiling, warm start, evaluating, training); phases nest."""
        ...

    def wait(self, describe: Callable[[], str]) -> AbstractContextManager[None]:
        """Inside, the run waits for other threads; ``describe`` says how far they are. It is called from any thread,
        every now and then, and must not wait itself.
        """
        ...

    def step(self, row: Mapping[str, SupportsFloat]) -> None:
        """A training step has ended. ``row`` is its metrics row; ``find_shown`` says what of it is shown."""
        ...

    def note(self, text: str) -> None:
        """Something worth a line. Any thread may call it."""
        ...

    def close(self) -> None:
        """Ends the display; later calls are without effect. Idempotent."""
        ...


class NoProgress:
    """A Progress that shows nothing."""

    @contextmanager
    def phase(self, name: str, detail: str = "") -> Iterator[None]:
        yield

    @contextmanager
    def wait(self, describe: Callable[[], str]) -> Iterator[None]:
        yield

    def step(self, row: Mapping[str, SupportsFloat]) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


def open_progress(*, steps: int, style: ProgressStyle = "auto", stream: TextIO | None = None) -> Progress:
    """The display for a run of ``steps`` training steps on ``stream`` (standard output if None).

    ``auto`` takes the panel for a terminal that can move its cursor and plain lines otherwise.
    """
    stream = sys.stdout if stream is None else stream
    if style == "none":
        return NoProgress()
    if style == "panel" or (style == "auto" and _is_terminal(stream)):
        from forgejax.report.live.panel import PanelProgress  # noqa: PLC0415 - rich only where it is shown

        return PanelProgress(stream, steps=steps)
    return LinesProgress(stream, steps=steps)


def _is_terminal(stream: TextIO) -> bool:
    return not stream.closed and stream.isatty() and os.environ.get("TERM", "dumb").lower() not in {"dumb", "unknown"}
