"""The rows of a run: one a step, waits told apart, programs counted and not calls."""

import time
from typing import Any, cast

import jax
import jax.numpy as jnp
import pytest

from forgejax.report.final.summary import read_summary
from forgejax.report.sinks.jsonl import read_metrics
from forgejax.rollout import EngineAccount
from forgejax.run.account import RunSums
from forgejax.run.rows import Compiles, StepRows
from forgejax.run.steps import StepData
from tests.run.tiny_run import Ended


def test_a_new_shape_counts_once_and_a_known_one_not_at_all() -> None:
    twice = jax.jit(lambda x: x * 2 + 1)
    inputs = [jnp.zeros(n) for n in (11, 13, 11)]  # made before anything is counted
    compiles = Compiles()
    counts = []
    for x in inputs:
        twice(x)
        counts.append(compiles.count)
    compiles.close()
    twice(jnp.zeros(17))

    assert (counts, compiles.count) == ([1, 2, 2], 2)


class Idle:
    """Engines that have drawn nothing."""

    def account(self) -> EngineAccount:
        return EngineAccount()


@pytest.mark.parametrize(
    ("began_s", "ended_s", "late_s"),
    [(-5.0, -4.0, 0.0), (-5.0, -1.0, 2.0), (-2.5, -1.0, 1.5)],
    ids=["packed before it was asked for", "packing as it was asked for", "packed while it was waited for"],
)
def test_a_wait_for_packing_is_what_would_not_have_been_waited_had_packing_taken_no_time(
    began_s: float, ended_s: float, late_s: float
) -> None:
    nothing: Any = cast(Any, None)
    sums, now = RunSums(), time.monotonic()
    rows = StepRows(
        learner=nothing,
        engines=cast(Any, Idle()),
        pool=nothing,
        gateway=nothing,
        compiles=nothing,
        sums=sums,
        sinks=nothing,
        progress=nothing,
    )
    packing = {"packing_began": now + began_s, "packing_ended": now + ended_s}
    rows.took(StepData(number=0, training=nothing, figures={}, **packing), asked_at=now - 3.0)

    assert sums.packing_wait_s == pytest.approx(late_s)
    assert 3.0 <= sums.wait_s < 4.0


def test_waits_for_data_and_compiled_shapes_are_told_step_by_step_and_in_all(ended: Ended) -> None:
    rows, figures = read_metrics(ended.path)[1:], read_summary(ended.path).figures
    seconds = sum(row["time/step_s"] for row in rows)

    for row in rows:
        assert 0.0 <= row["time/packing_wait_s"] <= min(row["time/wait_s"], row["time/packing_s"])
    for share, name in (("wait_share", "time/wait_s"), ("packing_wait_share", "time/packing_wait_s")):
        assert figures[share] == pytest.approx(sum(row[name] for row in rows) / seconds)
    shapes, compiles = ([row[name] for row in rows] for name in ("learner/batch_shapes", "process/compiles"))
    assert 1 <= shapes[0] <= shapes[-1] <= 4 < compiles[0] <= compiles[-1]
    assert shapes[-1] <= (figures["batch_shapes"] or 0) <= 8
    assert compiles[-1] <= (figures["compiles"] or 0)


def test_each_step_has_its_row_and_the_rows_of_evaluations_join_them(ended: Ended) -> None:
    rows, summary = read_metrics(ended.path), read_summary(ended.path)

    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert all("learner/loss" in row and row["learner/skipped"] == 0 for row in rows[1:])
    assert sum(row["learner/trained_terms"] for row in rows[1:]) == summary.tokens_trained
    assert [("eval/outcome" in row) for row in rows] == [True, False, False, True]
