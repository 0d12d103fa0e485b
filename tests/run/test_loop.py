"""A run as a whole, tiny: what it leaves behind, and that each thing that can go wrong shows and loses nothing."""

import contextlib
import dataclasses
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from forgejax.errors import AgentError, ForgejaxError, StorageFullError, TrainingError
from forgejax.gateway import Gateway
from forgejax.learner import Learner
from forgejax.pool.journal import Journal
from forgejax.pool.pool import Pool
from forgejax.report.final.invariants import checks
from forgejax.report.final.summary import Summary, read_summary
from forgejax.report.live.progress import NoProgress
from forgejax.report.sinks.jsonl import read_metrics
from forgejax.rollout import RequestLog
from forgejax.run import rundir
from forgejax.run.actors import RolloutService
from forgejax.run.build import Outcome, run
from forgejax.run.conclude import bounds, conclude, summarise
from forgejax.run.config import TrainConfig
from forgejax.run.loop import Trainer
from forgejax.run.rundir import RunDir
from forgejax.types import Group, Turn
from tests.run.tiny_run import GROUP, compiled_once, tiny_config, tiny_outcome, tiny_place

pytestmark = pytest.mark.usefixtures(compiled_once.__name__)
EVAL_TASKS = 8


class Notes(NoProgress):
    """What a run tells."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ended:
    """A run that has ended."""

    config: TrainConfig
    path: Path
    outcome: Outcome
    notes: list[str]

    @property
    def summary(self) -> Summary:
        return summarise(self.outcome, self.config)


def play(root: Path, *overrides: str) -> Ended:
    """A tiny run from its beginning to its end."""
    config = tiny_config(root, *overrides)
    return go_on(config, tiny_place(config))


def go_on(config: TrainConfig, place: RunDir) -> Ended:
    notes = Notes()
    outcome = tiny_outcome(config, place, notes)
    return Ended(config=config, path=place.path, outcome=outcome, notes=notes.lines)


def consumption(path: Path) -> dict[int, list[int]]:
    """The groups of each trained batch, in the lineage that survived."""
    with contextlib.closing(Journal.open(f"sqlite:///{path}/journal.sqlite")) as journal:
        taken: dict[int, list[int]] = {}
        for record in journal.consumption():
            if record.kind == "taken":
                taken.setdefault(record.step, []).append(record.index)
    return taken


def check(summary: Summary, config: TrainConfig, name: str) -> bool | None:
    """Whether an invariant of the report holds."""
    return next(each.holds for each in checks(summary, bounds(config)) if each.name == name)


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ended]:
    """One sound run of three steps on two devices, with the port it was told to take taken by somebody else."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = play(tmp_path_factory.mktemp("runs"), "--run.steps=3", f"--gateway.port={port}")
        place = rundir.reopen(ended.path.parent, ended.path.name)
        conclude(ended.outcome, ended.config, place, "python scripts/train.py")
        place.close()
        yield ended


def test_every_sampled_token_and_every_group_is_accounted_for(ended: Ended) -> None:
    summary = read_summary(ended.path)

    assert summary.tokens_sampled == summary.tokens_trained + sum(summary.tokens_not_trained.values())
    assert (summary.account_open_tokens, summary.groups_open) == (0, 0)
    assert summary.tokens_trained > 0
    assert summary.tokens_not_trained["evaluation"] == sum(turns_tokens(ended, "evaluation")), (
        "the pool's count against the engine's own log"
    )
    assert summary.tokens_not_trained["probe"] == sum(turns_tokens(ended, "probe")) > 0


def turns_tokens(ended: Ended, purpose: str) -> list[int]:
    """Sampled tokens of each request of a purpose, by the engine's log."""
    log = RequestLog(ended.path / "requests.log")
    try:
        found = [log.find(request_id) for request_id in log._offsets]
    finally:
        log.close()
    return [len(each.sampled_ids) for each in found if each is not None and each.purpose == purpose]


def test_what_was_trained_is_what_was_sampled(ended: Ended) -> None:
    summary = read_summary(ended.path)

    assert summary.drift_tokens == 0
    assert summary.logprob_gap_tokens > 100
    assert summary.logprob_gap_max is not None and 0.0 <= summary.logprob_gap_max <= 1e-4
    assert sum(turns_tokens(ended, "train")) >= summary.tokens_trained


def test_the_window_keeps_its_bounds(ended: Ended) -> None:
    summary, limits = read_summary(ended.path), bounds(ended.config)

    assert (limits.disorder, limits.staleness_steps) == (0, 1)
    assert summary.window_disorder_max == 0
    assert summary.staleness_steps_max is not None and summary.staleness_steps_max <= 1


def test_each_step_trains_its_groups_once_and_has_its_row(ended: Ended) -> None:
    taken, summary = consumption(ended.path), read_summary(ended.path)
    trained = [index for step in range(3) for index in taken[step]]

    assert len(trained) == len(set(trained)) == summary.groups_trained
    assert summary.steps == 3
    rows = read_metrics(ended.path)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert all("learner/loss" in row and row["learner/skipped"] == 0 for row in rows[1:])
    assert sum(row["learner/trained_terms"] for row in rows[1:]) == summary.tokens_trained
    assert [("eval/outcome" in row) for row in rows] == [True, False, False, True]


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


def test_the_run_leaves_a_curve_and_one_page_that_needs_nothing_else(ended: Ended) -> None:
    assert (ended.path / "curve.png").read_bytes().startswith(b"\x89PNG")
    page = (ended.path / "report.html").read_text(encoding="utf-8")
    assert "The account closes" in page and "python scripts/train.py" in page
    assert 'src="http' not in page and 'href="http' not in page
    assert json.loads((ended.path / "summary.json").read_text())["account_open_tokens"] == 0


def test_a_taken_port_is_no_obstacle_and_the_one_chosen_is_told(ended: Ended) -> None:
    line = next(line for line in ended.notes if line.startswith("the gateway listens at http://127.0.0.1:"))
    port = int(line.removeprefix("the gateway listens at http://127.0.0.1:").split("/")[0])

    assert port != ended.config.gateway.port


def test_a_learning_rate_of_zero_leaves_every_weight_as_it_was(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "--run.steps=3", "--step.optimizer.learning-rate=0", "--tasks.eval-tasks=0")
    place, seen = tiny_place(config), []

    def remember(trainer: Trainer) -> None:
        seen.extend(jax.device_get(jax.tree.leaves(trainer.learner.params())))

    with contextlib.closing(place):
        outcome = run(config, place, NoProgress(), remember)
    after = jax.device_get(jax.tree.leaves(outcome.trainer.learner.state.params))

    assert outcome.trainer.step == 3 and outcome.trainer.books.tally.trained_tokens > 0
    assert len(seen) == len(after) > 5
    assert all(np.array_equal(before, now) for before, now in zip(seen, after, strict=True))


def test_a_count_that_is_left_out_opens_the_account_by_just_that_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count_tokens, left_out = Pool.count_tokens, []

    def forgetful(pool: Pool, reason: str, tokens: int) -> None:
        if reason == "probe":
            left_out.append(tokens)
        else:
            count_tokens(pool, reason, tokens)

    monkeypatch.setattr(Pool, "count_tokens", forgetful)
    ended = play(tmp_path, "--tasks.eval-tasks=0")

    assert ended.summary.account_open_tokens == sum(left_out) > 0
    assert check(ended.summary, ended.config, "Token account") is False
    assert check(ended.summary, ended.config, "Group account") is True


def test_a_gateway_that_loses_turns_opens_the_account_by_their_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    close = Gateway.close
    lost: list[int] = []

    async def careless(gateway: Gateway, session_id: str) -> tuple[Turn, ...]:
        turns = await close(gateway, session_id)
        lost.extend(len(turn.completion.token_ids) for turn in turns[1:])
        return turns[:1]

    monkeypatch.setattr(Gateway, "close", careless)
    ended = play(tmp_path, "--tasks.eval-tasks=0")

    assert ended.summary.account_open_tokens == sum(lost) > 0
    assert check(ended.summary, ended.config, "Token account") is False


def test_ids_that_differ_from_the_engines_log_are_counted_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find, altered = RequestLog.find, []

    def corrupt(log: RequestLog, request_id: str) -> Any:
        found = find(log, request_id)
        assert found is not None
        altered.append(request_id)
        ids = found.sampled_ids.copy()
        ids[0] += 1
        return dataclasses.replace(found, sampled_ids=ids)

    monkeypatch.setattr(RequestLog, "find", corrupt)
    ended = play(tmp_path, "--tasks.eval-tasks=0")

    assert ended.summary.drift_tokens == len(altered) >= 2 * GROUP
    assert check(ended.summary, ended.config, "Token drift") is False


def poison(monkeypatch: pytest.MonkeyPatch, *versions: int) -> None:
    """Makes the advantages of the steps that start on these versions NaN."""
    update = Learner.update

    def poisoned(learner: Learner, batches: Any, version: int, **trunks: Any) -> Any:
        if version in versions:
            nan = np.float32(np.nan)
            batches = [dataclasses.replace(each, advantage=np.asarray(each.advantage) * nan) for each in batches]
        return update(learner, batches, version, **trunks)

    monkeypatch.setattr(Learner, "update", poisoned)


def test_a_step_that_is_not_finite_is_skipped_and_its_tokens_are_counted_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, 1)
    ended = play(tmp_path, "--run.steps=3", "--tasks.eval-tasks=0")
    rows = [row for row in read_metrics(ended.path) if "learner/loss" in row]

    assert [row["learner/skipped"] for row in rows] == [0, 1, 0]
    assert ended.summary.skipped_steps == 1
    assert ended.summary.tokens_not_trained["skipped_step"] == rows[1]["learner/trained_terms"] > 0
    assert ended.summary.tokens_trained == rows[0]["learner/trained_terms"] + rows[2]["learner/trained_terms"]
    assert ended.summary.account_open_tokens == 0
    assert "step 2 was not finite and has been skipped" in ended.notes


def test_a_skipped_step_that_is_trained_after_a_resume_is_counted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path, "--run.steps=4", "--run.max-skipped=2", "--tasks.eval-tasks=0")
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, checkpoint_every=0))
    place = tiny_place(config)
    with monkeypatch.context() as patched:
        poison(patched, 0, 1, 2)
        with pytest.raises(TrainingError, match=r"2 steps in a row had a loss or gradient that is not finite; lower"):
            go_on(config, place)
    ended = go_on(config, rundir.reopen(tmp_path, ""))

    assert ended.summary.steps == 4
    assert (ended.summary.skipped_steps, ended.summary.account_open_tokens, ended.summary.groups_open) == (0, 0, 0)
    assert "skipped_step" not in ended.summary.tokens_not_trained


def test_a_full_disk_ends_the_run_and_what_was_accepted_is_trained_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path, "--run.steps=3", "--tasks.eval-tasks=0")
    place, finish = tiny_place(config), Journal.finish
    accepted: list[int] = []

    def filling(journal: Journal, dispatch: Any, **values: Any) -> Any:
        if len(accepted) >= 3:
            raise StorageFullError("the journal cannot grow (disk is full); free space on its disk")
        accepted.append(dispatch.index)
        return finish(journal, dispatch, **values)

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "finish", filling)
        with pytest.raises(StorageFullError, match="the journal cannot grow"):
            go_on(config, place)
    ended = go_on(config, rundir.reopen(tmp_path, ""))
    dropped = sum(ended.summary.groups_not_trained.get(each, 0) for each in ("zero_advantage",))
    trained = {index for groups in consumption(ended.path).values() for index in groups}

    assert ended.summary.steps == 3
    assert len(set(accepted) - trained) <= dropped
    assert (ended.summary.account_open_tokens, ended.summary.groups_open, ended.summary.drift_tokens) == (0, 0, 0)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["--agent.kind=process", "--agent.command", "no-such-agent"], "is not an executable file and not on PATH"),
        (["--agent.kind=worker", "--agent.command", "false"], "ended with status 1; its stderr is empty"),
        (["--agent.kind=process", "--agent.command", "false"], "16 episodes in a row ended without a call"),
    ],
)
def test_an_agent_program_that_cannot_play_ends_the_run_with_its_own_words(
    tmp_path: Path, overrides: list[str], sentence: str
) -> None:
    with pytest.raises(AgentError) as caught:
        play(tmp_path, "--tasks.eval-tasks=0", *overrides)
    assert sentence in str(caught.value)


def test_an_agent_that_never_answers_is_cut_off_counted_and_waited_for_no_longer_than_allowed(tmp_path: Path) -> None:
    overrides = ["--agent.function=tiny_agent:never", "--agent.deadline-s=0.4", "--pool.take-timeout-s=2"]
    with pytest.raises(ForgejaxError, match="no group could be taken for 2 s"):
        play(tmp_path, "--tasks.eval-tasks=0", "--stop-policy.deadline=drop_group", *overrides)
    with contextlib.closing(Journal.open(f"sqlite:///{tmp_path}/tiny-1/journal.sqlite")) as journal:
        failed = [group.reason for group in journal.groups() if group.state == "failed"]
        tokens = journal.untrained_tokens()

    assert failed.count("deadline") >= 4
    assert tokens["deadline"] >= 4 * GROUP


def test_a_run_resumed_at_its_last_step_closes_its_books_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path, "--tasks.eval-tasks=0")
    place = tiny_place(config)

    class PowerCutError(Exception):
        """In place of a crash, which no test could go on after."""

    def cut_after_the_last_step(trainer: Trainer) -> None:
        save = trainer.save

        def save_and_cut() -> None:
            save()
            if trainer.step == config.run.steps:
                raise PowerCutError

        trainer.save = save_and_cut  # type: ignore[method-assign]

    finish = Pool.finish

    def finish_but_those_of_the_last_version(pool: Pool, group: Group) -> None:
        if group.dispatch.version < config.run.steps:
            finish(pool, group)

    with monkeypatch.context() as patched, contextlib.closing(place):
        patched.setattr(Pool, "finish", finish_but_those_of_the_last_version)
        patched.setattr(Pool, "fail", lambda *_: None)
        with pytest.raises(PowerCutError):
            run(config, place, NoProgress(), cut_after_the_last_step)
    dispatched = group_states(place.path).count("dispatched")
    monkeypatch.setattr(RolloutService, "start_groups", lambda _: None)
    ended = go_on(config, rundir.reopen(tmp_path, ""))

    assert ended.summary.steps == config.run.steps == 2
    assert ended.summary.groups_not_trained["lost_attempt"] == dispatched >= 1
    assert (ended.summary.account_open_tokens, ended.summary.groups_open) == (0, 0)
    assert ended.summary.wall_s > 0.5


def group_states(path: Path) -> list[str]:
    with contextlib.closing(Journal.open(f"sqlite:///{path}/journal.sqlite")) as journal:
        return [group.state for group in journal.groups()]
