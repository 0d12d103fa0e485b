"""The one door: a row is checked once and reaches every sink."""

import pytest

from forgejax.report.live.progress import NoProgress
from forgejax.report.sinks import Row, Sinks, Terminal


class Kept:
    """A sink that keeps its rows in a list."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.closed = 0

    def write(self, row: Row) -> None:
        self.rows.append(row)

    def close(self) -> None:
        self.closed += 1


class Broken(Kept):
    def close(self) -> None:
        super().close()
        raise OSError("stuck")


def test_each_sink_gets_each_row_once_with_plain_numbers() -> None:
    first, second = Kept(), Kept()
    sinks = Sinks(first, second)
    sinks.write({"step": 3, "loss": 2})

    assert [(row.step, dict(row.values)) for row in first.rows] == [(3, {"loss": 2.0})]
    assert second.rows == first.rows and first.rows[0].at > 1e9


def test_a_row_that_is_none_reaches_no_sink() -> None:
    kept = Kept()
    with pytest.raises(ValueError, match="without a step"):
        Sinks(kept).write({"loss": 2.0})
    assert kept.rows == []


def test_every_sink_is_closed_whatever_another_raises() -> None:
    sinks = Kept(), Broken(), Kept()
    with pytest.raises(OSError, match="stuck"):
        Sinks(*sinks).close()
    assert [sink.closed for sink in sinks] == [1, 1, 1]


def test_the_terminal_shows_training_steps_and_no_evaluations() -> None:
    class Steps(NoProgress):
        def step(self, row: object) -> None:
            shown.append(row)

    shown: list[object] = []
    sinks = Sinks(Terminal(Steps()))
    sinks.write({"step": 1, "reward/outcome": 0.5})
    sinks.write({"step": 1, "eval/outcome": 0.5})
    sinks.write({"step": 1, "eval/failed_share": 1.0})  # one whose every episode failed has no outcome
    sinks.write({"step": 1})  # one of no tasks

    assert shown == [{"step": 1, "reward/outcome": 0.5}]
