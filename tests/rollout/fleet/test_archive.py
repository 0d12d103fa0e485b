"""Laws of request logs that no engine writes any more."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from forgejax.rollout import Archive, LoggedRequest, RequestLog
from forgejax.rollout.fleet.archive import copy_archive


def write_log(path: Path, **sampled: int) -> RequestLog:
    log = RequestLog(path)
    for name, count in sampled.items():
        log.append(
            LoggedRequest(
                request_id=name,
                purpose="train",
                finish_reason="cancelled" if name == "cut" else "stop",
                version=3,
                prompt_ids=np.array([1, 2], np.int32),
                sampled_ids=np.arange(count, dtype=np.int32),
            )
        )
    return log


def test_several_logs_are_looked_up_as_one(tmp_path: Path) -> None:
    write_log(tmp_path / "a", one=3, cut=4).close()
    write_log(tmp_path / "b", two=5).close()
    archive = Archive([tmp_path / "a", tmp_path / "b"])
    found = archive.requests_of(["two", "cut", "never"])
    assert archive.inherited.sampled == 12 and archive.damaged == 0
    assert {name: (len(each.sampled_ids), each.cut) for name, each in found.items()} == {
        "two": (5, False),
        "cut": (4, True),
    }
    archive.trim(9)
    archive.close()


def test_a_copy_holds_what_was_written_and_leaves_the_log_to_the_next_process(tmp_path: Path) -> None:
    log = write_log(tmp_path / "a", one=3)
    log.write()
    archive = copy_archive(tmp_path / "a")
    log.append(LoggedRequest(**{**vars(log.find("one")), "request_id": "two"}))
    log.close()
    assert archive.inherited.sampled == 3 and set(archive.requests_of(["one", "two"])) == {"one"}
    archive.close()
    assert copy_archive(tmp_path / "never").inherited.sampled == 0
