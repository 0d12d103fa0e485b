"""The account of a run: what its sums count, how it is closed, and that it opens by just what is left out."""

import contextlib
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
import pytest

from forgejax.gateway import Gateway
from forgejax.learner.gap import GapFigures
from forgejax.pool.journal import Journal
from forgejax.pool.ledger import PoolSnapshot, TokenAccount
from forgejax.pool.pool import Pool, PoolConfig
from forgejax.pool.schema import sqlite_url
from forgejax.report.final.invariants import check_invariants
from forgejax.report.final.summary import read_summary
from forgejax.rollout import EngineAccount
from forgejax.run import rundir
from forgejax.run.account import Account, RunAccount, RunSums, describe_unrecorded, settle
from forgejax.run.actors import RolloutService
from forgejax.run.build import play_run
from forgejax.run.conclude import window_bounds
from forgejax.run.loop import Trainer
from forgejax.types import Dispatch, Group, Turn
from tests.run.tiny_run import Ended, Notes, go_on, group_states, logged_tokens, play, tiny_config, tiny_place

pytestmark = pytest.mark.usefixtures("compiled_once")


def test_a_skipped_step_trains_nothing_and_a_sound_one_ends_the_row() -> None:
    sums = RunSums()
    for skipped in (False, True, True):
        sums.count_step(terms=10, skipped=skipped)

    assert (sums.steps, sums.trained_tokens, sums.skipped_tokens) == (3, 10, 20)
    assert (sums.skipped_steps, sums.skipped_in_a_row) == (2, 2)
    sums.count_step(terms=5, skipped=False)
    assert (sums.trained_tokens, sums.skipped_steps, sums.skipped_in_a_row) == (15, 2, 0)


def test_gaps_add_up_over_calls_and_nothing_measured_is_no_mean() -> None:
    sums = RunSums()
    assert (sums.gap_mean, sums.tree_token_ratio) == (None, None)
    sums.count_gaps(np.zeros(0), np.zeros(0, np.int32))
    assert (sums.gap_mean, sums.gap_max, sums.gap_tokens) == (None, None, 0)
    sums.count_gaps(np.array([0.5, -0.1]), np.array([5, 500]))
    sums.count_gaps(np.array([0.3]), np.array([5]))

    assert RunSums.from_mapping(sums.to_mapping()) == sums
    assert (sums.gap_max, sums.gap_tokens) == (0.5, 3)
    assert sums.gap_mean == pytest.approx(0.3)


def test_episodes_add_up_by_reason() -> None:
    sums = RunSums()
    sums.count_episodes({"completed": 3, "agent_failed": 1}, {"agent_failed": 1})
    sums.count_episodes({"completed": 2}, {})
    assert (sums.episodes, sums.masked_episodes) == ({"completed": 5, "agent_failed": 1}, {"agent_failed": 1})
    assert RunSums.from_mapping(sums.to_mapping()) == sums


def test_a_clock_that_is_set_back_takes_nothing_from_the_wall_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [50.0]
    monkeypatch.setattr("forgejax.run.account.time.monotonic", lambda: now[0])
    nothing: Any = None
    account = RunAccount(engines=nothing, pool=nothing, sums=RunSums(), counted_at=40.0)
    account.count_time()
    now[0] = -86_350.0
    account.count_time()
    now[0] += 5.0
    account.count_time()
    assert account.sums.wall_s == 15.0


def test_sums_come_back_from_plain_data_as_they_were_and_refuse_anything_else() -> None:
    sums = RunSums(steps=3, wall_s=1.5, trained_tokens=7, gaps={"to_128": GapFigures(tokens=2, total=2e-7)})

    assert RunSums.from_mapping(sums.to_mapping()) == sums
    with pytest.raises(msgspec.ValidationError):
        RunSums.from_mapping({"steps": "three"})


def holds(ended: Ended, name: str) -> bool | None:
    """Whether an invariant of the report holds."""
    return next(
        each.holds for each in check_invariants(ended.summary, window_bounds(ended.config)) if each.name == name
    )


def snapshot(**changed: Any) -> PoolSnapshot:
    values: dict[str, Any] = dict.fromkeys(PoolSnapshot.__annotations__, 0)
    return PoolSnapshot(**(values | {"groups_dropped": {}, "groups_failed": {}} | changed))


def test_an_account_is_settled_from_what_each_part_counted_for_itself() -> None:
    account = settle(
        EngineAccount(sampled=100, cancelled=7, failed=2, inherited=50, inherited_cancelled=3, inherited_failed=1),
        TokenAccount(trained=1, waiting=0, not_trained={"probe": 11, "deadline": 0}),
        snapshot(
            groups_dispatched=12,
            groups_trained=4,
            groups_dropped={"zero_advantage": 2},
            groups_failed={"deadline": 1, "zero_advantage": 1},
            finished_waiting=3,
            waiting=1,
        ),
        RunSums(trained_tokens=120, skipped_tokens=7),
    )

    assert account == Account(
        tokens_sampled=150,
        tokens_trained=120,
        tokens_not_trained={"cancelled": 10, "probe": 11, "request_failed": 3, "skipped_step": 7},
        groups_dispatched=12,
        groups_trained=4,
        groups_not_trained={"deadline": 1, "in_flight_at_end": 1, "unused_at_end": 3, "zero_advantage": 3},
    )
    assert list(account.tokens_not_trained) == sorted(account.tokens_not_trained)


@pytest.mark.parametrize(("inherited", "told"), [(59, "hold 1 tokens fewer"), (60, None), (75, None)])
def test_a_run_that_goes_on_tells_how_many_tokens_the_engines_records_lack(inherited: int, told: str | None) -> None:
    engines = EngineAccount(inherited=inherited, inherited_cancelled=6, inherited_failed=4)
    found = describe_unrecorded(engines, TokenAccount(trained=20, waiting=10, not_trained={"probe": 20}))
    assert (found is None) if told is None else (found is not None and told in found)


class OtherAttempts:
    """An inference side that drew for two earlier attempts; one of its requests of this attempt ends late."""

    asked = 0

    def given_before(self) -> Mapping[str, int]:
        return {"group-0.0": 20, "group-1.0": 12, "evaluation-0.0": 42, "evaluation-1.2": 9}

    def account(self) -> EngineAccount:
        self.asked += 1
        ended = self.asked > 2  # the last request, which was cancelled
        before = {"inherited": 20 + 12 + 42 + 9 + 6 + 1, "inherited_cancelled": 6, "inherited_failed": 1}
        return EngineAccount(
            sampled=49 + 3, lost=3, cancelled=5 if ended else 2, failed=2, open=0 if ended else 3, **before
        )

    def flush(self) -> None:
        assert self.asked in (0, 3), "nothing is on its way any more"


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    """What is left of two attempts: a group that failed, one cut off by a crash, an evaluation, and one cut off."""
    url = sqlite_url(tmp_path / "journal.sqlite")
    journal = Journal.open(url)
    for index in range(2):
        journal.dispatch(index, version=0, taken_before=0)
    journal.fail(Dispatch(index=0, attempt=0, version=0), reason="deadline", untrained={"deadline": 20})
    journal.count_tokens("evaluation", 42, owner="evaluation-0.0")
    journal.close()
    return Pool.open(Journal.open(url), PoolConfig())


def test_what_only_the_engines_know_is_lost_by_owner_of_earlier_attempts_and_cancelled_or_failed_of_all(
    pool: Pool,
) -> None:
    engines = OtherAttempts()
    account = RunAccount.open(cast(Any, engines), pool, RunSums(), counted_at=0.0)
    assert account.name_owner("evaluation", 5) == "evaluation-1.5"
    account.count_evaluation(42, account.name_owner("evaluation", 5))
    closed = account.close()

    assert closed.tokens_not_trained == {
        **{"deadline": 20, "lost_attempt": 12 + 9, "evaluation": 42 + 42},
        **{"cancelled": 6 + 5, "request_failed": 1 + 2, "lost_replica": 3},
    }
    assert closed.tokens_sampled == 90 + 49 + 3 == sum(closed.tokens_not_trained.values())


@pytest.mark.parametrize(
    ("statement", "opened"),
    [
        ("UPDATE untrained_tokens SET tokens = tokens - 5 WHERE owner = 'evaluation-0.0'", 5),
        ("UPDATE untrained_tokens SET tokens = tokens + 7 WHERE owner = 'group-0.0'", -7),
        ("INSERT INTO untrained_tokens (owner, run_attempt, reason, tokens) VALUES ('x', 0, 'probe', 3)", -3),
    ],
)
def test_tokens_that_the_journal_loses_or_invents_are_open_and_not_lost_attempts(
    pool: Pool, tmp_path: Path, statement: str, opened: int
) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "journal.sqlite")) as connection:
        connection.execute(statement)
        connection.commit()
    pool = Pool.open(Journal.open(sqlite_url(tmp_path / "journal.sqlite")), PoolConfig())
    account = RunAccount.open(cast(Any, OtherAttempts()), pool, RunSums(), counted_at=0.0)
    account.count_evaluation(42, account.name_owner("evaluation", 5))
    closed = account.close()

    assert closed.tokens_not_trained["lost_attempt"] == 12 + 9
    assert closed.tokens_sampled - sum(closed.tokens_not_trained.values()) == opened


def test_every_sampled_token_and_every_group_is_accounted_for(ended: Ended) -> None:
    summary = read_summary(ended.path)

    assert summary.tokens_sampled == summary.tokens_trained + sum(summary.tokens_not_trained.values())
    assert (summary.account_open_tokens, summary.groups_open) == (0, 0)
    assert summary.tokens_trained > 0
    assert summary.tokens_not_trained["evaluation"] == sum(logged_tokens(ended.path, "evaluation")), (
        "the pool's count against the engine's own log"
    )
    assert summary.tokens_not_trained["probe"] == sum(logged_tokens(ended.path, "probe")) > 0


def test_a_count_that_is_left_out_opens_the_account_by_just_that_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count_tokens, left_out = Pool.count_tokens, []

    def forgetful(pool: Pool, reason: str, tokens: int, *, owner: str) -> None:
        if reason == "probe":
            left_out.append(tokens)
        else:
            count_tokens(pool, reason, tokens, owner=owner)

    monkeypatch.setattr(Pool, "count_tokens", forgetful)
    ended = play(tmp_path, "--tasks.eval-tasks=0")

    assert ended.summary.account_open_tokens == sum(left_out) > 0
    assert holds(ended, "Token account") is False
    assert holds(ended, "Group account") is True


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
    assert holds(ended, "Token account") is False


def test_a_run_resumed_at_its_last_step_closes_its_account_and_has_lost_just_what_was_in_flight(
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

    finish, lost = Pool.finish, []

    def finish_but_those_of_the_last_version(pool: Pool, group: Group, apart: Mapping[str, int]) -> None:
        if group.dispatch.version < config.run.steps:
            finish(pool, group, apart)
        else:
            lost.append(group.sampled_tokens)

    def lose(_: Pool, dispatch: Dispatch, sampled_tokens: int, apart: Mapping[str, int]) -> None:
        lost.append(sampled_tokens + sum(apart.values()))

    with monkeypatch.context() as patched, contextlib.closing(place):
        patched.setattr(Pool, "finish", finish_but_those_of_the_last_version)
        patched.setattr(Pool, "give_back", lose)
        with pytest.raises(PowerCutError):
            play_run(config, place, Notes(), cut_after_the_last_step)
    dispatched = group_states(place.path).count("dispatched")
    monkeypatch.setattr(RolloutService, "start_groups", lambda _: None)
    ended = go_on(config, rundir.reopen(tmp_path, ""))

    assert ended.summary.steps == config.run.steps == 2
    assert ended.summary.groups_not_trained["in_flight_at_end"] == dispatched >= 1
    assert ended.summary.tokens_not_trained["lost_attempt"] == sum(lost) > 0, "the episodes' own figures"
    assert (ended.summary.account_open_tokens, ended.summary.groups_open) == (0, 0)
    assert ended.summary.wall_s > 0.5
