"""The one door for rows of figures, and what stands behind it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol, SupportsFloat

from forgejax.report.names import STEP, TIME

NONFINITE = "_nonfinite"


@dataclass(frozen=True, kw_only=True)
class Row:
    """The figures of one step, or some of them; ``at`` is when they were known, in seconds of Unix time."""

    step: int
    values: Mapping[str, float]
    at: float


class Sink(Protocol):
    """Where rows go. One thread at a time."""

    def write(self, row: Row) -> None:
        """Takes one row. A second row of a step adds to the first. Raises StorageFullError or ConfigError."""
        ...

    def close(self) -> None:
        """Idempotent."""
        ...


class Sinks:
    """Every row goes through here, and on to each sink in turn."""

    def __init__(self, *sinks: Sink) -> None:
        self._sinks = sinks

    def write(self, figures: Mapping[str, SupportsFloat]) -> None:
        """Passes one row on; ``figures["step"]`` says which step. Values are numbers or arrays of one number.

        Raises ValueError for a row that is none, before any sink has it, and what a sink raises.
        """
        row = read_row(figures)
        for sink in self._sinks:
            sink.write(row)

    def close(self) -> None:
        """Closes every sink, whatever another raises. Idempotent."""
        with ExitStack() as stack:
            for sink in self._sinks:
                stack.callback(sink.close)


def read_row(figures: Mapping[str, SupportsFloat]) -> Row:
    """The figures as floats, of now. Raises ValueError for a row that is none."""
    if STEP not in figures:
        raise ValueError(f"metrics row without a step: {sorted(figures)}; expected the key 'step'")
    reserved = {TIME, NONFINITE} & figures.keys()
    if reserved:
        raise ValueError(f"metrics row uses the reserved names {sorted(reserved)}; give these metrics other names")
    values: dict[str, float] = {}
    for name, value in figures.items():
        try:
            values[name] = float(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"metric {name!r} is {value!r}; expected one number") from error
    return Row(step=int(values.pop(STEP)), values=values, at=time.time())
