"""What a run leaves behind when it has ended."""

import json

import msgspec

from forgejax.report.final.summary import read_summary
from forgejax.report.sinks.jsonl import read_metrics
from forgejax.run.conclude import summarise, window_bounds
from forgejax.run.loop import Outcome
from tests.run.tiny_run import GROUP, Ended


def test_an_outcome_is_plain_data_and_a_summary_needs_nothing_else(ended: Ended) -> None:
    copy = msgspec.json.decode(msgspec.json.encode(ended.outcome), type=Outcome)

    assert copy == ended.outcome
    assert summarise(copy, ended.config) == read_summary(ended.path)
    assert (copy.finished, copy.steps, copy.eval_tasks) == (True, 3, 8)


def test_the_window_keeps_its_bounds(ended: Ended) -> None:
    summary, limits = read_summary(ended.path), window_bounds(ended.config)

    assert (limits.disorder, limits.staleness_steps) == (0, 1)
    assert summary.window_disorder_max == 0
    assert summary.staleness_steps_max is not None and summary.staleness_steps_max <= 1


def test_the_run_leaves_a_curve_and_one_page_that_needs_nothing_else(ended: Ended) -> None:
    assert (ended.path / "curve.png").read_bytes().startswith(b"\x89PNG")
    page = (ended.path / "report.html").read_text(encoding="utf-8")
    assert "The account closes" in page and "python scripts/train.py" in page
    assert 'src="http' not in page and 'href="http' not in page
    assert json.loads((ended.path / "summary.json").read_text())["account_open_tokens"] == 0
    assert page.count("<figcaption>") == 10 and "The training steps took" in page
    assert "The run was made in one go" in page and "<td>processor</td>" in page and "8 × cpu" in page


def test_training_episodes_are_counted_by_how_they_ended(ended: Ended) -> None:
    summary = read_summary(ended.path)
    rows = read_metrics(ended.path)

    assert summary.episodes == {"completed": sum(row.get("episodes/completed", 0) for row in rows)}
    assert summary.episodes["completed"] >= summary.groups_trained * GROUP
    assert summary.episodes_masked == {} and ended.outcome.failures == ()
    assert all(row["share/failed_episodes"] == 0.0 for row in rows[1:])
