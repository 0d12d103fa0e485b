"""The request log keeps what it was given."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from forgejax.errors import EngineError
from forgejax.rollout import LoggedRequest, RequestLog
from forgejax.rollout.driver.request_log import InheritedTokens


def _entry(
    name: str, *sampled: int, prompt: np.ndarray | None = None, session: str = "", version: int = 0
) -> LoggedRequest:
    return LoggedRequest(
        request_id=name,
        session_id=session,
        purpose="train",
        finish_reason="stop",
        version=version,
        prompt_ids=np.arange(3, dtype=np.int32) if prompt is None else prompt,
        sampled_ids=np.array(sampled, np.int32),
    )


def _session(name: str, turns: int, *, told: int = 100, drawn: int = 2000, version: int = 0) -> list[LoggedRequest]:
    """An agent's requests; each prompt goes on from the request before."""
    rng = np.random.default_rng(len(name) + turns)
    prompt, found = rng.integers(0, 150_000, 500, dtype=np.int32), []
    for number in range(turns):
        sampled = rng.integers(0, 150_000, drawn)
        found.append(_entry(f"{name}-{number}", *sampled, prompt=prompt, session=name, version=version))
        prompt = np.concatenate([prompt, found[-1].sampled_ids, rng.integers(0, 150_000, told, dtype=np.int32)])
    return found


def _is_kept(log: RequestLog, entry: LoggedRequest) -> bool:
    found = log.find(entry.request_id)
    return (
        found is not None
        and found.prompt_ids.tolist() == entry.prompt_ids.tolist()
        and found.sampled_ids.tolist() == entry.sampled_ids.tolist()
        and (found.purpose, found.owner, found.version) == (entry.purpose, entry.owner, entry.version)
    )


def _write(path: Path, entries: Sequence[LoggedRequest]) -> RequestLog:
    log = RequestLog(path)
    for entry in entries:
        log.append(entry)
    log.flush()
    return log


def test_tokens_are_inherited_by_how_their_requests_ended_and_by_owner_as_far_as_the_records_reach(
    tmp_path: Path,
) -> None:
    path = tmp_path / "requests.log"
    old = [replace(entry, owner="old") for entry in _session("s", 30, drawn=16_000)]
    log = _write(path, old)
    ends = {"stop": (7, "a"), "length": (5, "a"), "repetition": (4, "b"), "cancelled": (3, "a"), "failed": (2, "b")}
    for reason, (count, owner) in ends.items():
        log.append(replace(_entry(reason, *range(count), version=1), finish_reason=reason, owner=owner))
    assert log.inherited.sampled == 0
    log.close()
    log = RequestLog(path)
    assert log.inherited.given == {"old": 30 * 16_000, "a": 12, "b": 4}
    with log._disk:
        log._file.trim(1)
    log.close()
    log = RequestLog(path)

    assert log.inherited == InheritedTokens(sampled=30 * 16_000 + 21, cancelled=3, failed=2, given={"a": 12, "b": 4})
    log.close()


def test_an_entry_is_found_at_once_and_after_a_restart(tmp_path: Path) -> None:
    log = RequestLog(tmp_path / "requests.log")
    log.append(_entry("a", 5, 6))
    for reopen in (False, True):
        if reopen:
            log.close()
            log = RequestLog(tmp_path / "requests.log")
        found = log.find("a")
        assert found is not None and found.sampled_ids.tolist() == [5, 6] and found.prompt_ids.tolist() == [0, 1, 2]
        assert (found.purpose, found.finish_reason, log.find("b")) == ("train", "stop", None)
    log.append(_entry("b", 7))
    log.flush()
    assert len(log) == 2
    log.close()
    log.close()


@pytest.mark.parametrize("cut", [1, 7, 8, 9, 30])
def test_a_torn_tail_costs_only_the_torn_entry_and_the_log_goes_on(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "requests.log"
    log = RequestLog(path)
    log.append(_entry("whole", 1))
    log.flush()
    size = path.stat().st_size
    log.append(_entry("torn", 2))
    log.close()
    path.write_bytes(path.read_bytes()[: size + cut])
    log = RequestLog(path)
    assert log.find("whole") is not None and log.find("torn") is None
    log.append(_entry("next", 3, 4))
    log.close()
    log = RequestLog(path)
    found = log.find("next")
    assert found is not None and found.sampled_ids.tolist() == [3, 4] and len(log) == 2
    log.close()


def test_a_damaged_entry_is_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "requests.log"
    log = RequestLog(path)
    log.append(_entry("a", 1))
    log.close()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    log = RequestLog(path)
    assert log.find("a") is None
    log.close()


def test_another_file_is_refused_untouched(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("these are my notes, not a log of requests")
    with pytest.raises(EngineError, match="not a request log"):
        RequestLog(path)
    assert path.read_text().startswith("these are my notes")


def test_a_full_disk_is_told_to_the_next_caller(tmp_path: Path) -> None:
    log = RequestLog(tmp_path / "requests.log")
    log._file._file.close()
    log._file._file = io.FileIO("/dev/full", "r+b")  # refuses every write
    log.append(_entry("a", 1))
    with pytest.raises(EngineError, match="cannot be written"):
        log.flush()
    with pytest.raises(EngineError, match="cannot be written"):
        log.append(_entry("b", 2))
    with pytest.raises(EngineError, match="cannot be written"):
        log.close()


@pytest.mark.parametrize("turns", [1, 8, 50])
def test_an_id_takes_three_bytes_at_any_number_of_turns(tmp_path: Path, turns: int) -> None:
    path = tmp_path / "requests.log"
    entries = _session("one", turns)
    log = _write(path, entries)
    assert path.stat().st_size < 3 * (500 + turns * 2100) + 100 * turns + 100
    assert all(_is_kept(log, entry) for entry in entries)
    log.close()
    log = RequestLog(path)
    assert log.inherited.sampled == turns * 2000
    assert all(_is_kept(log, entry) for entry in entries)
    log.close()


def test_sessions_that_branch_and_take_turns_come_back(tmp_path: Path) -> None:
    entries = _session("a", 4, drawn=30) + _session("b", 3, drawn=20)
    root = entries[1].prompt_ids
    for number in range(12):  # sub-agents, and a history from which thoughts were cut
        cut = np.append(root[: 500 + 3 * number], np.arange(number, dtype=np.int32))
        entries.append(_entry(f"c{number}", 5, number, prompt=cut, session="a"))
    order = np.random.default_rng(0).permutation(len(entries))
    log = _write(tmp_path / "requests.log", [entries[number] for number in order])
    assert all(_is_kept(log, entry) for entry in entries)
    log.close()
    log = _write(tmp_path / "requests.log", _session("a", 2, drawn=9))  # ids that are used again mean the latest
    assert all(_is_kept(log, entry) for entry in [*_session("a", 2, drawn=9), *entries[2:]])
    log.close()


@pytest.mark.parametrize("part", ["mark", "sizes", "note", "body"])
def test_a_damaged_byte_costs_its_record_and_nothing_that_follows(tmp_path: Path, part: str) -> None:
    path = tmp_path / "requests.log"
    entries = [_entry(f"r{number}", *range(50), number) for number in range(20)]
    log = RequestLog(path)
    for entry in entries[:9]:
        log.append(entry)
    log.flush()
    start = path.stat().st_size
    for entry in entries[9:]:
        log.append(entry)
    log.close()
    content = bytearray(path.read_bytes())
    content[start + {"mark": 1, "sizes": 5, "note": 20, "body": 120}[part]] ^= 0x40
    path.write_bytes(content)
    log = RequestLog(path)
    assert [_is_kept(log, entry) for entry in entries] == [number != 9 for number in range(20)]
    assert (log.damaged, log.inherited.sampled) == (1, 20 * 51)
    log.append(_entry("next", 1))
    log.close()
    log = RequestLog(path)
    assert _is_kept(log, _entry("next", 1)) and _is_kept(log, entries[19]) and log.inherited.sampled == 20 * 51 + 1
    log.close()


def test_any_damaged_byte_leaves_the_records_of_other_sessions(tmp_path: Path) -> None:
    path = tmp_path / "requests.log"
    entries = [each for name in "abc" for each in _session(name, 2, told=3, drawn=9)]
    _write(path, entries).close()
    sound = path.read_bytes()
    for place in range(0, len(sound), 41):
        damaged = bytearray(sound)
        damaged[place] ^= 0x11
        path.write_bytes(damaged)
        log = RequestLog(path)
        kept = [_is_kept(log, entry) for entry in entries]
        found = [log.find(entry.request_id) for entry in entries]
        assert all(keeps or entry is None for keeps, entry in zip(kept, found, strict=True))  # never a wrong one
        assert sum(kept) >= 4
        log.close()


def test_a_trimmed_log_forgets_older_versions_and_keeps_its_totals(tmp_path: Path) -> None:
    path = tmp_path / "requests.log"
    sessions = [_session("a" * (version + 1), 16, version=version) for version in range(30)]
    log = RequestLog(path)
    for version, entries in enumerate(sessions):
        for entry in entries:
            log.append(entry)
        log.flush()
        log.trim(version - 2)
        with log._disk:
            log._file.trim(version - 2)
        assert all(_is_kept(log, entry) for kept in sessions[max(0, version - 2) : version + 1] for entry in kept)
    session = 3 * (500 + 16 * 2100) + 16 * 100
    assert path.stat().st_size < 2 * 3 * session + 2**20 + 2 * session
    assert log.find("a-0") is None
    log.append(
        _entry("a-16", 3, prompt=sessions[0][-1].prompt_ids, session="a", version=29)
    )  # goes on from the trimmed
    log.close()
    log = RequestLog(path)
    assert _is_kept(log, _entry("a-16", 3, prompt=sessions[0][-1].prompt_ids, version=29))
    assert all(_is_kept(log, entry) for kept in sessions[27:] for entry in kept)
    assert (log.inherited.sampled, log.damaged) == (30 * 16 * 2000 + 1, 0)
    log.close()
    assert [each.name for each in tmp_path.iterdir()] == ["requests.log"]


def test_a_disk_without_room_for_a_trimmed_copy_keeps_the_log_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = [each for version in range(12) for each in _session("s" * (version + 1), 16, version=version)]
    log = _write(tmp_path / "requests.log", entries)

    def refuse(*_: object) -> bytes:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("forgejax.rollout.driver.request_file.os.pread", refuse)
        with log._disk:
            log._file.trim(11)
    assert all(_is_kept(log, entry) for entry in entries)
    with log._disk:
        log._file.trim(11)
    assert [_is_kept(log, entry) for entry in entries] == [entry.version == 11 for entry in entries]
    log.close()
