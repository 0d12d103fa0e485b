"""Request logs that no engine writes any more: of earlier attempts with other engines, of servers that died."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from forgejax.rollout.driver.request_log import NO_TOKENS, LoggedRequest, RequestLog
from forgejax.rollout.fleet.base import DrawnRequest


class Archive:
    """Several logs, to be looked up in; for any thread. ``inherited`` are the tokens of the requests in all of them."""

    def __init__(self, paths: Sequence[Path] = ()):
        """Raises EngineError for a file that is no request log."""
        self._logs: list[RequestLog] = []
        with contextlib.ExitStack() as on_error:
            on_error.callback(self.close)
            for path in paths:
                self._logs.append(RequestLog(path))
            on_error.pop_all()
        self.inherited = sum((log.inherited for log in self._logs), NO_TOKENS)

    def requests_of(self, request_ids: Iterable[str]) -> dict[str, DrawnRequest]:
        """See ``Engines``."""
        found: dict[str, DrawnRequest] = {}
        for name in request_ids:
            entry = next(filter(None, (log.find(name) for log in self._logs)), None)
            if entry is not None:
                found[name] = read_record(entry)
        return found

    @property
    def damaged(self) -> int:
        return sum(log.damaged for log in self._logs)

    def trim(self, version: int) -> None:
        """See ``Engines``."""
        for log in self._logs:
            log.trim(version)

    def close(self) -> None:
        """Idempotent."""
        for log in self._logs:
            log.close()


def read_record(entry: LoggedRequest) -> DrawnRequest:
    """A logged request as the audit compares it."""
    return DrawnRequest(
        prompt_ids=entry.prompt_ids, sampled_ids=entry.sampled_ids, cut=entry.finish_reason == "cancelled"
    )


def copy_archive(path: Path) -> Archive:
    """The log at ``path`` as it is now, while another process may begin to write it. Raises EngineError or OSError."""
    if not path.exists():
        return Archive()
    copy = path.with_name(path.name + ".copy")
    shutil.copyfile(path, copy)
    return Archive([copy])
