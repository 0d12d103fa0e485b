import math
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from forgejax.report.final import plots
from forgejax.report.final.plots import draw_curve


def size(png: bytes) -> tuple[int, int]:
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", png[16:24])
    return width, height


@pytest.mark.parametrize("count", [1, 60])
@pytest.mark.parametrize("tools", [0.0, 0.5])
def test_a_curve_of_any_length_is_drawn_at_one_size(count: int, tools: float) -> None:
    rows = [
        {"step": step, "reward/outcome": step / 60, "tools/a": tools, "tools/b": math.nan, "episode/tokens": 9.0}
        for step in range(count)
    ]
    rows[-1] |= {"eval/outcome": 0.9, "eval/tools_a": tools}
    png = draw_curve(rows)
    assert png is not None and size(png) == (1350, 960)


def test_a_panel_without_figures_is_left_out_and_nothing_at_all_is_no_picture() -> None:
    assert draw_curve([]) is None
    png = draw_curve([{"step": 0, "eval/outcome": 0.5, "eval/tools_a": 0.0}])
    assert png is not None and size(png) == (1350, 555)


def test_levels_may_be_named_as_they_like() -> None:
    row = {"step": 1.0, **{f"tools/{level}": 0.5 for level in (r"$\frac$", "_x", "a/b", "\ud800")}}
    assert draw_curve([row, row | {"step": 2.0, r"eval/tools_$\frac$": 0.1}]) is not None


def test_the_lower_panel_shows_tools_where_any_level_used_one_and_the_episodes_length_elsewhere() -> None:
    row = {"step": 1.0, "reward/outcome": 0.5, "tools/a": 0.0, "tools/b": 0.0, "episode/tokens": 9.0}
    assert [drawing.__name__ for drawing, _ in plots._panels([row])] == ["_draw_reward", "_draw_length"]
    assert [drawing.__name__ for drawing, _ in plots._panels([row | {"eval/tools_b": 0.1}])] == [
        "_draw_reward",
        "_draw_tools",
    ]


def test_drawing_is_silent_without_a_display_or_a_home(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    program = """
import sys
from forgejax.report.final.plots import draw_curve
assert "matplotlib" not in sys.modules
draw_curve([{"step": 1, "reward/outcome": 0.5, "eval/outcome": 0.5, "eval/outcome_se": 0.1}])
assert "matplotlib.pyplot" not in sys.modules
"""
    kept = {name: value for name, value in os.environ.items() if name not in {"DISPLAY", "MPLCONFIGDIR"}}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env=kept | {"HOME": "/dev/null", "XDG_CONFIG_HOME": "/dev/null", "XDG_CACHE_HOME": "/dev/null"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
