import math
from typing import Any, cast

import pytest

from forgejax.report.final.series import choose_window, make_figure, quote_label, read_series, render_png, smooth_values


def test_the_trailing_mean_leaves_out_what_is_not_finite() -> None:
    assert smooth_values([1.0, math.nan, 0.0, 0.5], 2) == [1.0, 1.0, 0.0, 0.25]
    assert math.isnan(smooth_values([math.nan], 3)[0])


def test_a_series_has_the_steps_at_which_it_was_measured() -> None:
    rows: list[dict[str, float]] = [
        {"step": 1, "x": 2.0},
        {"step": 2},
        {"step": 3, "x": math.nan},
        {"step": 4, "x": math.inf},
        {"step": 5, "x": 0},
    ]
    assert read_series(rows, "x") == ([1, 5], [2.0, 0])


def test_a_mean_is_over_more_steps_the_more_there_are() -> None:
    assert [choose_window(range(count)) for count in (0, 15, 16, 80, 1000)] == [1, 1, 2, 10, 20]


@pytest.mark.parametrize("name", [r"$\frac$", "_x", "$a$ $b$", r"\$x$", "a\nb", "\ud800", "$", "", "plain ± name"])
def test_a_name_that_others_chose_is_shown_as_it_is(name: str) -> None:
    figure = make_figure(3.0, 2.0, dpi=50)
    axes = figure.subplots()
    axes.plot([1.0, 2.0], [1.0, 2.0], label=quote_label(f"{name}, training"))
    (shown,) = axes.legend().get_texts()
    render_png(figure)
    plain, math_mode = cast(Any, shown)._preprocess_math(shown.get_text())
    visible = name.replace("\n", "\N{REPLACEMENT CHARACTER}").replace("\ud800", "\N{REPLACEMENT CHARACTER}")
    assert (plain.lstrip("\N{ZERO WIDTH SPACE}"), math_mode) == (f"{visible}, training", False)
