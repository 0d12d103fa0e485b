import math
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from forgejax.report.final.plots import reward_curve, smoothed


def size(png: bytes) -> tuple[int, int]:
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", png[16:24])
    return width, height


def test_the_trailing_mean_leaves_out_what_is_not_finite() -> None:
    assert smoothed([1.0, math.nan, 0.0, 0.5], 2) == [1.0, 1.0, 0.0, 0.25]
    assert math.isnan(smoothed([math.nan], 3)[0])


@pytest.mark.parametrize("count", [0, 1, 60])
def test_a_curve_of_any_length_is_drawn_at_one_size(count: int) -> None:
    rows = [
        {"step": step, "reward/outcome": step / 60, "tools/easy": 0.5, "tools/hard": math.nan} for step in range(count)
    ]
    if count:
        rows[-1] |= {"eval/outcome": 0.9, "eval/tools_easy": 0.1}
    assert size(reward_curve(rows)) == (1350, 960)


def test_drawing_is_silent_without_a_display_or_a_home(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    program = """
import sys
from forgejax.report.final.plots import reward_curve
assert "matplotlib" not in sys.modules
reward_curve([{"step": 1, "reward/outcome": 0.5, "eval/outcome": 0.5, "eval/outcome_se": 0.1}])
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
