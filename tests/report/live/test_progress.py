import io
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from forgejax.report.live.board import Board, strip_controls
from forgejax.report.live.lines import LinesProgress, format_step
from forgejax.report.live.outlet import Outlet
from forgejax.report.live.panel import PanelProgress, draw_panel, draw_sparkline
from forgejax.report.live.progress import NoProgress, Progress, open_progress

ROW: dict[str, float] = {
    "reward/outcome": 0.5,
    "share/failed_episodes": 0.25,
    "share/dropped_groups": 0.125,
    "learner/entropy": 1.25,
    "learner/grad_norm": 0.0123,
    "tools/easy": 0.1,
    "tools/hard": 0.9,
    "throughput/sampled": 12345.0,
    "throughput/trained_unmerged": 2345.0,
    "pool/head": 12.0,
    "pool/in_flight": 16,
    "staleness/max": 2,
    "engine/cache_hit": 0.83,
    "learner/tree_ratio": 4.5,
    "learner/logprob_gap": 3.1e-7,
}


class Clock:
    """A clock that tests set."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_stream_that_is_no_terminal_gets_plain_lines() -> None:
    stream = io.StringIO()
    progress = open_progress(steps=2, stream=stream)
    with progress.phase("training", "2 steps"):
        progress.step({"step": 1, **ROW})
        progress.step({"step": 2, "reward/outcome": 0.75})
    progress.close()
    progress.note("too late")
    first, step_1, step_2, last = stream.getvalue().splitlines()
    assert first.endswith("training: 2 steps ...")
    assert (
        "step 1/2 | outcome 0.500 | tools easy 10% | tools hard 90% | episodes failed 25% | groups dropped 12%"
        in step_1
    )
    assert "| entropy 1.250 | grad norm 0.0123 | sampled tok/s 12,345" in step_1
    assert "cache hits 83% | tree ratio 4.50x | logprob gap 3.1e-07" in step_1
    assert "step 2/2 | outcome 0.750" in step_2 and "eta 0.0s" in step_2
    assert "training done in" in last


def test_a_rate_is_that_of_the_last_steps_together() -> None:
    board = Board(20)
    rates = [(0.0, 10.0), (105_704.0, 0.01), (0.0, 0.0)]  # sampled a second, and the seconds of the step
    for step, (rate, seconds) in enumerate(rates, start=1):
        board.add_step({"step": step, "throughput/sampled": rate, "time/step_s": seconds})
    assert board.view().row["throughput/sampled"] == pytest.approx(1057.04 / 10.01)
    board.add_step({"step": 4, "reward/outcome": 1.0})
    assert board.view().row["throughput/sampled"] == pytest.approx(1057.04 / 10.01)
    for step in range(5, 13):
        board.add_step({"step": step, "throughput/sampled": 7.0, "time/step_s": 2.0})
    assert board.view().row["throughput/sampled"] == 7.0  # what was before is forgotten


def test_what_went_wrong_is_counted_by_reason_since_the_start() -> None:
    board = Board(9)
    counts = {"episodes/completed": 8, "episodes/deadline": 2, "episodes/cancelled": 1, "groups/zero_advantage": 3}
    for step in (1, 2):
        board.add_step({"step": step, **counts, "masked/no_turns": 1, "masked/deadline": 2})
    board.add_step({"step": 3})
    line = format_step(board.view())
    assert "| episodes deadline 4 | masked no_turns 2 | groups zero_advantage 6 |" in line
    assert "completed" not in line and "cancelled" not in line and "masked deadline" not in line


def test_plain_lines_hold_no_control_character_whatever_is_noted() -> None:
    stream = io.StringIO()
    progress = open_progress(steps=1, stream=stream)
    progress.note("one\x1b[2J\x07two\ttabs\r\nthree\u2028four\u202eright-to-left\x9b31m")
    with progress.phase("eval\x1buating"):
        pass
    progress.close()
    assert all(char.isprintable() for line in stream.getvalue().split("\n") for char in line)
    assert "note: one [2J two tabs\n" in stream.getvalue() and "note: three" in stream.getvalue()


def test_quick_steps_share_a_line_but_the_last_has_its_own() -> None:
    clock, stream = Clock(), io.StringIO()
    progress = LinesProgress(stream, steps=30, interval_s=2.0, clock=clock)
    for step in range(1, 31):
        clock.now += 0.25
        progress.step({"step": step})
    progress.close()
    shown = [line.split("step ")[1].split("/")[0] for line in stream.getvalue().splitlines()]
    assert shown == ["1", "9", "17", "25", "30"]


def test_a_phase_that_raises_is_said_to_have_failed() -> None:
    stream = io.StringIO()
    progress = open_progress(steps=1, stream=stream)
    with pytest.raises(KeyError), progress.phase("compiling"):
        raise KeyError
    progress.close()
    assert "compiling failed in" in stream.getvalue()


def test_the_time_left_is_the_median_pace_and_counts_from_a_resumed_step() -> None:
    clock = Clock()
    board = Board(110, clock=clock)
    board.add_step({"step": 100})
    assert board.view().eta_s is None
    for step, seconds in ((101, 2.0), (102, 50.0), (103, 3.0)):
        clock.now += seconds
        board.add_step({"step": step})
    assert board.view().eta_s == 3.0 * 7


def test_phases_nest_and_the_innermost_is_shown() -> None:
    clock = Clock()
    board = Board(1, clock=clock)
    board.begin("training", "")
    clock.now += 5
    board.begin("evaluating", "64 tasks")
    clock.now += 1
    assert (board.view().phase, board.view().detail, board.view().phase_s) == ("evaluating", "64 tasks", 1.0)
    assert board.end() == 1.0
    assert (board.view().phase, board.view().phase_s, board.view().elapsed_s) == ("training", 6.0, 6.0)


def test_a_row_without_a_step_is_refused() -> None:
    with pytest.raises(ValueError, match="expected the key 'step'"):
        Board(1).add_step({"loss": 1.0})


@pytest.mark.parametrize("width", [1, 5, 12, 28, 29, 40, 80, 200])
def test_no_line_of_the_panel_is_wider_than_the_terminal(width: int) -> None:
    board = Board(20)
    board.begin("evaluating", "64 held-out tasks of each level, greedy, 漢字" * 5)
    for step in range(1, 12):
        board.add_step({"step": step, **ROW, "reward/outcome": step / 11})
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    with console.capture() as captured:
        console.print(draw_panel(board.view(), width=width))
    lines = captured.get().splitlines()
    assert max(cell_len(line) for line in lines) <= width
    if width >= 80:
        text = "\n".join(lines)
        for words in ("step 11/20", "eta", "evaluating", "tools hard 90%", "(unmerged) 2,345", "window head 12"):
            assert words in text
        bar, sparks = lines[2].strip("│ "), lines[3].strip("│ ")
        assert set(bar) == {"━", "─"} and len(bar) == width - 4
        assert bar.count("━") == round(11 / 20 * (width - 4))
        assert sparks == "reward ▂▂▃▄▄▅▅▆▇▇█"


def test_the_sparkline_shows_the_last_values_and_leaves_a_gap_for_what_is_not_finite() -> None:
    assert draw_sparkline([0.0, float("nan"), 1.0, 7.0], 3) == " ██"
    assert draw_sparkline([0.0, 0.5], 0) == ""
    assert len(draw_sparkline([0.5] * 100, 10)) == 10


def test_the_panel_takes_notes_from_many_threads_and_closes_twice() -> None:
    stream = io.StringIO()
    progress = PanelProgress(stream, steps=3, refresh_hz=50, width=60)

    def talk() -> None:
        for _ in range(50):
            progress.note("from a thread")

    threads = [threading.Thread(target=talk) for _ in range(4)]
    with progress.phase("training"):
        for thread in threads:
            thread.start()
        for step in range(1, 4):
            progress.step({"step": step, **ROW})
        for thread in threads:
            thread.join(10)
    progress.close()
    progress.close()
    progress.note("late")
    assert stream.getvalue().count("note: from a thread") == 200 and "step 3/3" in stream.getvalue()
    assert stream.getvalue().endswith("\x1b[?25h")  # the cursor is shown again


def test_a_stalled_reader_holds_up_nobody() -> None:
    reader, writer = os.pipe()
    with os.fdopen(reader), os.fdopen(writer, "w") as stream:
        outlet = Outlet(stream, capacity=8)
        begun = time.monotonic()
        for _ in range(200):
            outlet.write("x" * 4096)
        outlet.close(deadline_s=0.2)
        assert time.monotonic() - begun < 2.0
        assert outlet.dropped > 100
        os.set_blocking(reader, False)
        while outlet._thread.is_alive():
            try:
                os.read(reader, 1 << 20)
            except BlockingIOError:
                time.sleep(0.01)


def test_a_descriptor_that_someone_made_non_blocking_still_gets_everything() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with os.fdopen(reader, "rb") as incoming, os.fdopen(writer, "w") as stream:
        outlet = Outlet(stream)
        for _ in range(100):
            outlet.write("x" * 4096)
        received = b""
        while len(received) < 100 * 4096:
            received += incoming.read(4096)
        outlet.close()
    assert received == b"x" * 409600 and outlet.dropped == 0


@pytest.mark.parametrize("style", ["lines", "panel"])
def test_a_reader_that_went_away_does_not_end_the_run(style: str, tmp_path: Path) -> None:
    program = f"""
import sys, time
from forgejax.report.live.progress import open_progress
progress = open_progress(steps=50, style={style!r})
with progress.phase("training"):
    for step in range(1, 51):
        progress.step({{"step": step}})
        progress.note("x" * 2000)
        time.sleep(0.004)
print("still alive", flush=True)
progress.close()
open({str(tmp_path / "done")!r}, "w").close()
"""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", program], stdout=writer, stderr=subprocess.PIPE, timeout=60, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (tmp_path / "done").exists()


def test_text_that_the_stream_cannot_encode_is_replaced() -> None:
    raw = io.BytesIO()
    progress = open_progress(steps=1, stream=io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    progress.note("résumé \ud800")
    progress.close()
    assert b"note: r?sum?" in raw.getvalue()


def test_a_terminal_that_cannot_move_its_cursor_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for term, expected in (("dumb", LinesProgress), ("xterm-256color", PanelProgress)):
        monkeypatch.setenv("TERM", term)
        progress = open_progress(steps=1, stream=Terminal())
        progress.close()
        assert type(progress) is expected
    silent: Progress = open_progress(steps=1, style="none")
    assert isinstance(silent, NoProgress)


def test_printable_text_is_one_line() -> None:
    assert strip_controls(" a\n\tb\x00 \u200bc ") == "a b c"


def draw(board: Board) -> str:
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system="standard")
    console.print(draw_panel(board.view(), width=80))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize(("share", "stands_out"), [(0.49, False), (0.5, True)])
def test_half_of_the_episodes_failing_stands_out(share: float, stands_out: bool) -> None:
    board = Board(4)
    board.add_step({"step": 1, "share/failed_episodes": share})
    assert ("\x1b[1;31m" in draw(board)) is stands_out


def test_lines_tell_of_a_wait_every_now_and_then_and_less_often_the_longer_it_takes() -> None:
    stream = io.StringIO()
    progress = LinesProgress(stream, steps=2, wait_s=0.02)
    said = [0]

    def describe() -> str:
        said[0] += 1
        return f"step 1: {said[0]} of 8 groups done"

    with progress.wait(describe):
        time.sleep(0.5)
    told = said[0]
    time.sleep(0.1)
    progress.close()

    assert 5 < told < 0.5 / 0.02  # 0.02 s, five times, and then a fifth of what went by
    assert said[0] == told
    assert stream.getvalue().splitlines()[0].endswith("] step 1: 1 of 8 groups done")


def test_lines_tell_of_a_phase_that_nothing_else_is_said_of() -> None:
    stream = io.StringIO()
    progress = LinesProgress(stream, steps=2, quiet_s=0.05)
    with progress.phase("training", "2 steps"), progress.phase("compiling", "the engine"):
        time.sleep(0.3)
    progress.close()
    lines = [line.split("] ")[1] for line in stream.getvalue().splitlines()]
    told = [line for line in lines if line.startswith("compiling: the engine, for ") and line.endswith(" so far")]
    assert 1 <= len(told) <= 6  # 0.3 s, and at most one in 0.05 s
    assert lines[:2] == ["training: 2 steps ...", "compiling: the engine ..."]
    assert lines[2:-2] == told and lines[-1].startswith("training done in")


def test_a_wait_that_is_short_is_not_told_of() -> None:
    stream = io.StringIO()
    progress = LinesProgress(stream, steps=2)
    with progress.wait(lambda: "never"):
        pass
    progress.close()
    assert stream.getvalue() == ""


def test_the_panel_shows_what_is_waited_for_in_place_of_the_phases_detail() -> None:
    board = Board(2)
    board.begin("training", "2 steps")
    with board.wait(lambda: "step 1: 3 of 8 groups done"):
        waiting = draw(board)
    assert "step 1: 3 of 8 groups done" in waiting and "2 steps" not in waiting
    assert "2 steps" in draw(board)
