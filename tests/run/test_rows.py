"""The rows of a run: one a step, waits told apart, programs counted and not calls."""

import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from forgejax.agents import EpisodeTally
from forgejax.pool.ledger import PoolSnapshot
from forgejax.report.final.summary import read_summary
from forgejax.report.sinks.jsonl import read_metrics
from forgejax.rollout import EngineAccount
from forgejax.run.account import RunSums
from forgejax.run.rows import Compiles, StepRows
from forgejax.run.steps import StepData
from forgejax.types import StopReason
from tests.agents.fakes import make_trajectory
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


class Engines:
    """Engines that have drawn so many tokens."""

    sampled = 0

    def account(self) -> EngineAccount:
        return EngineAccount(sampled=self.sampled)

    def figures(self) -> dict[str, float]:
        return {}


def make_rows(**parts: Any) -> StepRows:
    """Rows of parts that do nothing."""
    given: dict[str, Any] = {
        "learner": SimpleNamespace(batch_shapes=set()),
        "engines": Engines(),
        "pool": SimpleNamespace(attempt=1, snapshot=lambda: PoolSnapshot(**NO_GROUPS)),
        "gateway": SimpleNamespace(counts=dict),
        "episodes": EpisodeTally(),
        "compiles": SimpleNamespace(count=0),
        "sums": RunSums(),
        "sinks": Kept(),
        "progress": None,
    }
    return StepRows(**(given | parts))


class Kept:
    """A sink that keeps its rows."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def write(self, row: dict[str, float]) -> None:
        self.rows.append(row)


COUNTS = ("version", "head", "in_flight", "waiting", "running", "finished_waiting", "groups_dispatched")
MAXIMA = ("groups_trained", "disorder_max", "lag_max", "staleness_max")
NO_GROUPS: dict[str, Any] = dict.fromkeys((*COUNTS, *MAXIMA), 0) | {"groups_dropped": {}, "groups_failed": {}}
STATS = SimpleNamespace(
    tree_token_ratio=1.0,
    attention_pair_ratio=1.0,
    row_fill=1.0,
    pair_imbalance=1.0,
    unmerged_tokens=20,
    tree_tokens=10,
)
METRICS: Any = {"skipped": 0.0, "trained_terms": 30.0}


def step_of(began: float, ended: float) -> StepData:
    training: Any = SimpleNamespace(packed=SimpleNamespace(stats=STATS))
    return StepData(number=0, training=training, figures={}, packing_began=began, packing_ended=ended)


@pytest.mark.parametrize(
    ("began_s", "ended_s", "late_s"),
    [(-5.0, -4.0, 0.0), (-5.0, -1.0, 2.0), (-2.5, -1.0, 1.5)],
    ids=["packed before it was asked for", "packing as it was asked for", "packed while it was waited for"],
)
def test_a_wait_for_packing_is_what_would_not_have_been_waited_had_packing_taken_no_time(
    began_s: float, ended_s: float, late_s: float
) -> None:
    now, rows = time.monotonic(), make_rows()
    rows.took(step_of(now + began_s, now + ended_s), asked_at=now - 3.0)

    assert rows.sums.packing_wait_s == pytest.approx(late_s)
    assert 3.0 <= rows.sums.wait_s < 4.0


def test_a_step_has_its_own_seconds_and_rates_whenever_its_row_is_completed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the last one, and one before a checkpoint, whose rows are completed as soon as they are begun."""
    now = [100.0]
    monkeypatch.setattr("forgejax.run.rows.time.monotonic", lambda: now[0])
    engines, sinks = Engines(), Kept()
    rows = make_rows(engines=engines, sinks=sinks)
    complete = None
    for step in (1, 2):
        now[0] += 1.0  # a probe
        asked_at = now[0]
        now[0] += 2.0
        rows.took(step_of(0.0, 0.0), asked_at)
        now[0] += 3.0
        engines.sampled += 60
        begun = rows.open(step_of(0.0, 0.0), step, METRICS)
        if complete is not None:
            complete()
        complete = begun
    assert complete is not None
    complete()
    for row in sinks.rows:
        times = [row[f"time/{name}_s"] for name in ("between", "wait", "train", "step")]
        assert times == [1.0, 2.0, 3.0, 6.0]
        assert (row["throughput/sampled"], row["throughput/trained_unmerged"]) == (10.0, 5.0)
    assert rows.sums.train_s == 12.0


def test_a_row_counts_the_groups_and_episodes_since_the_one_before() -> None:
    groups, tally, sinks = (
        dict(NO_GROUPS, groups_trained=5, groups_dropped={"zero_advantage": 2}),
        EpisodeTally(),
        Kept(),
    )
    pool = SimpleNamespace(attempt=1, snapshot=lambda: PoolSnapshot(**groups))
    rows = make_rows(pool=pool, episodes=tally, sinks=sinks)
    rows.took(step_of(0.0, 0.0), time.monotonic())
    for reason, masked in ((StopReason.AGENT_FAILED, "agent_failed"), (StopReason.COMPLETED, None)):
        tally.observe(make_trajectory(stop_reason=reason, masked=masked), "train")
    groups |= {"groups_trained": 8, "groups_dropped": {"zero_advantage": 2, "too_few_members": 1}}
    rows.open(step_of(0.0, 0.0), 1, METRICS)()
    rows.open(step_of(0.0, 0.0), 2, METRICS)()

    first, second = sinks.rows
    counted = {name: value for name, value in first.items() if name.split("/")[0] in ("episodes", "masked", "groups")}
    assert counted == {
        "episodes/agent_failed": 1,
        "episodes/completed": 1,
        "masked/agent_failed": 1,
        "groups/too_few_members": 1,
    }
    assert (first["share/failed_episodes"], first["share/dropped_groups"]) == (0.5, 0.25)
    assert not {name for name in second if name.split("/")[0] in ("episodes", "masked", "groups")}
    assert (second["share/failed_episodes"], second["share/dropped_groups"]) == (0.5, 0.25)  # of the recent ones
    assert rows.sums.episodes == {"agent_failed": 1, "completed": 1}
    assert rows.sums.masked_episodes == {"agent_failed": 1}


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


def test_every_figure_of_a_row_is_told_in_the_table_of_the_docs(ended: Ended) -> None:
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
    cells = "".join(line.split("|")[1] for line in page.splitlines() if line.startswith("| `"))
    told = [re.sub(r"[A-Z]+", "[a-z0-9_-]+", name) for name in re.findall(r"`([^`]+)`", cells)]
    names = {name for row in read_metrics(ended.path) for name in row}

    assert len(names) > 50 and sorted(name for name in names if not re.fullmatch("|".join(told), name)) == []


def test_each_step_has_its_row_and_the_rows_of_evaluations_join_them(ended: Ended) -> None:
    rows, summary = read_metrics(ended.path), read_summary(ended.path)

    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert all("learner/loss" in row and row["learner/skipped"] == 0 for row in rows[1:])
    assert sum(row["learner/trained_terms"] for row in rows[1:]) == summary.tokens_trained
    assert [("eval/outcome" in row) for row in rows] == [True, False, False, True]
