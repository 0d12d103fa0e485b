"""The plots of a run's course: those there is something to draw for, at one size."""

import math

import pytest

from forgejax.report.final.courses import Course, draw_courses
from forgejax.report.final.courses import _average_rates as average_rates
from forgejax.report.final.courses import _find_resumes as find_resumes
from forgejax.report.final.courses import _measure_gap as measure_gap
from tests.report.final.test_plots import size

ROW = {
    "learner/entropy": 0.8,
    "learner/clip_fraction": 0.01,
    "learner/grad_norm": 1.5,
    "learner/learning_rate": 1e-5,
    "learner/gap_max": 1e-5,
    "learner/gap_sum": 1e-4,
    "learner/gap_tokens": 100.0,
    "reply/tokens": 12.0,
    "reply/tokens_p95": 40.0,
    "reply/cut_share": 0.1,
    "staleness/mean": 0.5,
    "staleness/max": 2.0,
    "share/failed_episodes": 0.0,
    "share/dropped_groups": 0.25,
    "throughput/sampled": 900.0,
    "throughput/trained_unmerged": 800.0,
    "time/step_s": 5.0,
    "time/wait_s": 2.0,
    "time/packing_wait_s": 0.5,
    "time/train_s": 2.5,
}
TITLES = [
    "Entropy",
    "Reply length",
    "Gradient norm",
    "Clip fraction",
    "Learning rate",
    "Log-prob gap",
    "Staleness",
    "What was lost",
    "Tokens a second",
    "Where time goes",
]


def titles(courses: tuple[Course, ...]) -> list[str]:
    return [course.title for course in courses]


@pytest.mark.parametrize("count", [1, 70])
def test_a_run_of_any_length_has_all_its_plots_at_one_size(count: int) -> None:
    courses = draw_courses(
        [{"step": 0.0, "eval/outcome": 0.5}, *({"step": step, **ROW} for step in range(1, count + 1))]
    )
    assert titles(courses) == TITLES
    assert {size(course.png) for course in courses} == {(780, 403)}


def test_a_plot_without_figures_is_left_out() -> None:
    assert draw_courses([]) == ()
    assert titles(draw_courses([{"step": 1.0, "learner/entropy": 0.5, "learner/grad_norm": math.nan}])) == ["Entropy"]


def test_figures_of_nothing_but_zeros_and_of_far_apart_values_are_drawn() -> None:
    rows = [{"step": step, "learner/grad_norm": 10.0**step, "learner/clip_fraction": 0.0} for step in range(6)]
    assert titles(draw_courses(rows)) == ["Gradient norm", "Clip fraction"]


def test_the_mean_gap_is_over_the_tokens_it_was_measured_on_and_on_none_there_is_no_gap() -> None:
    assert measure_gap(ROW) == {"gap_mean": 1e-6}
    nothing = measure_gap({**ROW, "learner/gap_tokens": 0.0})
    assert list(nothing) == ["learner/gap_max"] and math.isnan(nothing["learner/gap_max"])


def test_rates_are_drawn_over_several_steps_together() -> None:
    rows = [{"step": 0.0, "eval/outcome": 0.5}, *({"step": step, "throughput/sampled": 0.0, "time/step_s": 9.0}
            for step in (1.0, 2.0)), {"step": 3.0, "throughput/sampled": 105_704.0, "time/step_s": 0.01}]  # fmt: skip
    assert [row.get("throughput/sampled") for row in average_rates(rows)] == [None, 0.0, 0.0, 1057.04 / 18.01]


def test_a_resume_lies_between_the_steps_of_two_attempts() -> None:
    rows = [{"step": step, "process/attempt": 1 if step < 4 else 3} for step in (1, 2, 3, 4, 5)]
    assert find_resumes([{"step": 0}, *rows]) == [3.5]
