"""The request log keeps what it was given."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest

from forgejax.errors import EngineError
from forgejax.rollout import LoggedRequest, RequestLog


def _entry(name: str, *sampled: int) -> LoggedRequest:
    ids = np.array(sampled, np.int32)
    return LoggedRequest(
        request_id=name, purpose="train", finish_reason="stop", prompt_ids=np.arange(3, dtype=np.int32), sampled_ids=ids
    )


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
    log._file.close()
    log._file = io.FileIO("/dev/full", "r+b")  # refuses every write
    log.append(_entry("a", 1))
    with pytest.raises(EngineError, match="cannot be written"):
        log.flush()
    with pytest.raises(EngineError, match="cannot be written"):
        log.append(_entry("b", 2))
    with pytest.raises(EngineError, match="cannot be written"):
        log.close()
