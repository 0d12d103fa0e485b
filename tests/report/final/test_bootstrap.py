import numpy as np
import pytest

from forgejax.report.final.bootstrap import measure_gain


def test_the_gain_is_the_mean_over_tasks_measured_twice() -> None:
    gain = measure_gain({"a": 0.0, "b": 0.5, "gone": 1.0}, {"a": 1.0, "b": 0.5, "new": 0.0})
    assert gain is not None
    assert (gain.mean, gain.tasks) == (0.5, 2)
    assert (gain.low, gain.high) == (0.0, 1.0)


def test_one_task_gives_no_interval() -> None:
    assert measure_gain({"a": 0.0}, {"a": 1.0}) is None


def test_the_interval_is_that_of_the_normal_law_for_many_tasks() -> None:
    rng = np.random.default_rng(1)
    before, moved = rng.random(400), rng.normal(0.1, 0.4, 400)
    tasks = [str(task) for task in range(400)]
    gain = measure_gain(dict(zip(tasks, before, strict=True)), dict(zip(tasks, before + moved, strict=True)))
    error = moved.std() / np.sqrt(400)
    assert gain is not None
    assert gain.low == pytest.approx(moved.mean() - 1.96 * error, abs=0.15 * error)
    assert gain.high == pytest.approx(moved.mean() + 1.96 * error, abs=0.15 * error)


def test_pairing_ignores_how_different_tasks_are_from_each_other() -> None:
    before = {str(task): float(task % 2) for task in range(100)}
    gain = measure_gain(before, {task: outcome + 0.25 for task, outcome in before.items()})
    assert gain is not None
    assert gain.low == gain.high == 0.25
