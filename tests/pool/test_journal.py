import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import sqlalchemy as sa

from forgejax.errors import ConfigError, PoolError, StorageFullError
from forgejax.pool.journal import Consumption, Journal, Kind
from forgejax.pool.schema import sqlite_url
from forgejax.types import Dispatch


def journal_in(folder: Path) -> Journal:
    return Journal.open(sqlite_url(folder / "pool.sqlite"))


def finish(journal: Journal, dispatch: Dispatch, payload: bytes = b"x", tokens: int = 5) -> str:
    return journal.finish(dispatch, task_id="t", payload=payload, sampled_tokens=tokens)


def consumption(index: int, step: int, kind: Kind = "taken") -> Consumption:
    return Consumption(index=index, step=step, kind=kind, reason=None, untrained={"masked": 2}, disorder=1, lag=4)


def test_each_opening_claims_the_next_run_attempt(tmp_path: Path) -> None:
    assert [journal_in(tmp_path).attempt for _ in range(3)] == [0, 1, 2]


def test_a_zombie_cannot_write_and_the_newest_can(tmp_path: Path) -> None:
    zombie = journal_in(tmp_path)
    dispatch = zombie.dispatch(0, version=0, taken_before=0)
    newest = journal_in(tmp_path)
    writes = [
        lambda: finish(zombie, dispatch),
        lambda: zombie.fail(dispatch, reason="deadline", untrained={"deadline": 1}),
        lambda: zombie.give_back(dispatch, untrained={"in_flight_at_end": 1}),
        lambda: zombie.dispatch(1, version=0, taken_before=0),
        lambda: zombie.consume(consumption(0, 0)),
        lambda: zombie.count_tokens("evaluation", 3, owner="evaluation-0.0"),
        lambda: zombie.count_lost({}),
        lambda: zombie.resume(0),
        lambda: zombie.void(0),
        lambda: zombie.forget(0),
    ]
    for write in writes:
        with pytest.raises(PoolError, match="run attempt 0 may not write to the journal: attempt 1 has taken over"):
            write()
    assert finish(newest, dispatch) == "accepted"
    assert [row.state for row in newest.groups()] == ["finished"]


def test_what_was_accepted_is_there_after_the_process_is_gone(tmp_path: Path) -> None:
    journal = journal_in(tmp_path)
    payload = bytes(range(256)) * 40
    finish(journal, journal.dispatch(0, version=3, taken_before=2), payload)
    # A copy of the files as they are now, without closing: what a crash would leave.
    crashed = tmp_path / "crashed"
    crashed.mkdir()
    for file in tmp_path.glob("pool.sqlite*"):
        (crashed / file.name).write_bytes(file.read_bytes())
    again = journal_in(crashed)
    (row,) = again.groups()
    assert (row.index, row.attempt, row.version, row.taken_before, row.sampled_tokens) == (0, 0, 3, 2, 5)
    assert again.payload(0) == payload


def test_a_killed_process_loses_nothing_it_was_told_is_accepted(tmp_path: Path) -> None:
    program = """
import sys
from forgejax.pool.journal import Journal
journal = Journal.open(sys.argv[1])
for index in range(100_000):
    dispatch = journal.dispatch(index, version=0, taken_before=0)
    journal.finish(dispatch, task_id="t", payload=b"%d" % index * 1000, sampled_tokens=1)
    print(index, flush=True)
"""
    url = sqlite_url(tmp_path / "pool.sqlite")
    with subprocess.Popen([sys.executable, "-c", program, url], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        accepted = [int(process.stdout.readline()) for _ in range(20)]
        process.kill()
        accepted += [int(line) for line in process.stdout]
    journal = journal_in(tmp_path)
    finished = [row.index for row in journal.groups() if row.state == "finished"]
    assert finished[: len(accepted)] == accepted
    assert len(finished) <= len(accepted) + 1
    assert all(journal.payload(index) == b"%d" % index * 1000 for index in finished)


def test_a_repeated_finish_changes_nothing(tmp_path: Path) -> None:
    journal = journal_in(tmp_path)
    dispatch = journal.dispatch(0, version=0, taken_before=0)
    assert finish(journal, dispatch, b"first") == "accepted"
    assert finish(journal, dispatch, b"second") == "repeated"
    assert journal.payload(0) == b"first"


def test_a_finish_of_a_given_up_attempt_counts_its_tokens_once_and_is_not_kept(tmp_path: Path) -> None:
    journal = journal_in(tmp_path)
    old = journal.dispatch(0, version=0, taken_before=0)
    journal = journal_in(tmp_path)
    journal.resume(0)
    assert finish(journal, old, tokens=11) == "lost"
    assert finish(journal, old, tokens=11) == "repeated"
    new = journal.dispatch(0, version=4, taken_before=0)
    assert new == Dispatch(index=0, attempt=1, version=4)
    assert journal.fail(old, reason="deadline", untrained={"deadline": 11}) == "repeated"
    assert finish(journal, new, b"kept") == "accepted"
    assert journal.untrained_tokens() == {"lost_attempt": 11}
    assert journal.payload(0) == b"kept"


def test_a_group_that_is_given_back_waits_for_its_next_attempt_and_its_tokens_are_counted_once(tmp_path: Path) -> None:
    journal = journal_in(tmp_path)
    first = journal.dispatch(0, version=0, taken_before=0)
    for outcome in ("accepted", "repeated"):
        assert journal.give_back(first, untrained={"in_flight_at_end": 11}) == outcome
    assert finish(journal, first, tokens=11) == "repeated"
    assert [(row.state, row.attempt, row.sampled_tokens) for row in journal.groups()] == [("waiting", 1, 0)]
    assert journal.dispatch(0, version=4, taken_before=2) == Dispatch(index=0, attempt=1, version=4)
    assert journal.untrained_tokens() == {"in_flight_at_end": 11}


def test_what_is_sampled_apart_from_the_episodes_of_a_group_is_counted_with_its_report_and_once(tmp_path: Path) -> None:
    journal = journal_in(tmp_path)
    kept, failed = (journal.dispatch(index, version=0, taken_before=0) for index in range(2))
    for _ in range(2):
        journal.finish(kept, task_id="t", payload=b"x", sampled_tokens=5, apart={"worker_died": 3})
        journal.fail(failed, reason="deadline", untrained={"deadline": 7, "worker_died": 4})
    assert journal.untrained_tokens() == {"worker_died": 7, "deadline": 7}


def test_what_was_drawn_for_owners_that_nobody_reported_is_lost_and_counted_once(tmp_path: Path) -> None:
    journal = journal_in(tmp_path)
    finished, failed, given_back, cut = (journal.dispatch(index, version=0, taken_before=0) for index in range(4))
    journal.finish(finished, task_id="t", payload=b"x", sampled_tokens=5, apart={"worker_died": 3})
    journal.fail(failed, reason="deadline", untrained={"deadline": 0})
    journal.give_back(given_back, untrained={"in_flight_at_end": 2})
    journal.count_tokens("evaluation", 40, owner="evaluation-0.0")
    drawn = {"group-0.0": 8, "group-1.0": 90, "group-2.0": 90, "evaluation-0.0": 41}  # whatever was said of them holds
    lost = {"group-3.0": 6, "evaluation-0.12": 11, "probe-0.12": 0}
    nobody = {"": 1000}
    for total in (17, 0):
        journal = journal_in(tmp_path)
        journal.resume(0)
        assert journal.count_lost(drawn | lost | nobody) == total
        assert journal.untrained_tokens() == {
            **{"worker_died": 3, "deadline": 0, "in_flight_at_end": 2, "evaluation": 40},
            "lost_attempt": 17,
        }
    assert finish(journal, cut, tokens=6) == "repeated", "a late report of it is counted already"


def test_a_report_that_contradicts_the_journal_is_refused(tmp_path: Path) -> None:
    journal = journal_in(tmp_path)
    first, second = (journal.dispatch(i, version=0, taken_before=0) for i in range(2))
    journal.fail(first, reason="deadline", untrained={"deadline": 7})
    finish(journal, second)
    with pytest.raises(PoolError, match="group 0 is reported as finished, but it is failed"):
        finish(journal, first)
    with pytest.raises(PoolError, match="group 1 is reported as failed, but it is finished"):
        journal.fail(second, reason="deadline", untrained={"deadline": 7})
    with pytest.raises(PoolError, match="group 5 attempt 0 was never dispatched"):
        finish(journal, Dispatch(index=5, attempt=0, version=0))
    with pytest.raises(PoolError, match="group 1 attempt 3 was never dispatched"):
        finish(journal, Dispatch(index=1, attempt=3, version=0))
    assert journal.untrained_tokens() == {"deadline": 7}


def test_a_resume_voids_what_the_checkpoint_does_not_hold(tmp_path: Path) -> None:
    journal = journal_in(tmp_path)
    for index in range(4):
        finish(journal, journal.dispatch(index, version=0, taken_before=0))
        journal.consume(consumption(index, step=index))
    with pytest.raises(PoolError, match="UNIQUE"):
        journal.consume(consumption(3, step=4))
    journal.resume(2)
    assert [(record.index, record.step) for record in journal.consumption()] == [(0, 0), (1, 1)]
    journal.consume(consumption(3, step=2, kind="dropped"))
    assert journal.consumption()[-1] == consumption(3, step=2, kind="dropped")
    with pytest.raises(PoolError, match="cannot go on from step 9: the journal knows 3 steps"):
        journal.resume(9)


def test_forgotten_groups_free_their_bytes_and_bar_an_earlier_resume(tmp_path: Path) -> None:
    journal = journal_in(tmp_path)
    for index in range(3):
        finish(journal, journal.dispatch(index, version=0, taken_before=0))
        journal.consume(consumption(index, step=index))
    assert journal.forget(2) == 0
    with pytest.raises(PoolError, match="group 1: the journal holds no bytes"):
        journal.payload(1)
    assert journal.payload(2) == b"x"
    with pytest.raises(PoolError, match="resume from a checkpoint at step 2 or later"):
        journal.resume(1)
    journal.resume(2)
    finish(journal, journal.dispatch(3, version=0, taken_before=0))
    journal.consume(consumption(2, step=2))
    journal.consume(consumption(3, step=3))
    assert journal.forget(3) == 0  # goes on from where it forgot last
    assert journal.kept() == [3]


def test_what_is_forgotten_tells_the_oldest_version_that_is_still_needed(tmp_path: Path) -> None:
    journal = journal_in(tmp_path)
    assert journal.forget(0) is None
    started = [journal.dispatch(index, version=5 + index, taken_before=0) for index in range(4)]
    finish(journal, started[1])
    finish(journal, started[2])
    journal.consume(consumption(1, step=0))
    journal.fail(started[0], reason="deadline", untrained={"deadline": 0})
    assert journal.forget(0) == 6
    assert journal.forget(1) == 7
    journal.consume(consumption(2, step=1))
    assert journal.forget(2) == 8  # it is running
    finish(journal, started[3])
    journal.consume(consumption(3, step=2))
    assert journal.forget(3) is None


def test_a_full_disk_is_said_so_and_loses_nothing(tmp_path: Path) -> None:
    journal = journal_in(tmp_path)
    first, second = (journal.dispatch(i, version=0, taken_before=0) for i in range(2))
    finish(journal, first, b"a" * 5000)
    with journal._engine.connect() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StorageFullError, match=r"database or disk is full.*nothing accepted before is lost"):
        finish(journal, second, b"b" * 500_000)
    assert journal.payload(0) == b"a" * 5000
    assert [row.state for row in journal.groups()] == ["finished", "dispatched"]
    with journal._engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA max_page_count = 100000")
    assert finish(journal, second, b"b" * 500_000) == "accepted"


def test_no_statement_carries_a_groups_bytes_for_it_would_be_copied_while_no_other_thread_runs(tmp_path: Path) -> None:
    journal = journal_in(tmp_path)
    given: list[object] = []
    payload = bytes(range(256)) * 4000
    dispatches = [journal.dispatch(index, version=0, taken_before=0) for index in range(2)]

    @sa.event.listens_for(journal._engine, "before_cursor_execute")
    def keep(_connection: object, _cursor: object, _statement: str, parameters: tuple[object, ...], *_: object) -> None:
        given.extend(parameters)

    finish(journal, dispatches[0], payload)
    finish(journal, dispatches[1], b"")
    assert len(payload) in given and not any(isinstance(value, bytes | memoryview) for value in given)
    assert [journal.payload(index) for index in range(2)] == [payload, b""]


def test_a_commit_is_synced_to_the_disk_before_it_returns(tmp_path: Path) -> None:
    with journal_in(tmp_path)._engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2  # FULL
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"


def test_threads_may_write_and_read_side_by_side(tmp_path: Path) -> None:
    journal = journal_in(tmp_path)
    dispatches = [journal.dispatch(index, version=0, taken_before=0) for index in range(12)]
    threads = [threading.Thread(target=finish, args=(journal, d, bytes([d.index]))) for d in dispatches]
    for thread in threads:
        thread.start()
    journal.groups()
    for thread in threads:
        thread.join(20)
    assert [journal.payload(index) for index in range(12)] == [bytes([index]) for index in range(12)]


def test_a_file_that_is_no_journal_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pool.sqlite").write_bytes(b"no database at all " * 100)
    with pytest.raises(PoolError, match=r"the journal is damaged \(file is not a database\)"):
        journal_in(tmp_path)
    with pytest.raises(PoolError, match="unable to open database file"):
        journal_in(tmp_path / "missing")


def test_a_journal_of_another_schema_is_refused(tmp_path: Path) -> None:
    journal_in(tmp_path).close()
    raw = sqlite3.connect(tmp_path / "pool.sqlite")
    raw.execute("UPDATE run SET schema = 99")
    raw.commit()
    raw.close()
    with pytest.raises(PoolError, match="schema 99, expected 3"):
        journal_in(tmp_path)


@pytest.mark.parametrize("url", ["", "nonsense", "sqlite://", "sqlite:///:memory:", "nosuchdb:///x"])
def test_an_unusable_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="expected"):
        Journal.open(url)
