"""A process that a benchmark measures: started, asked line by line, ended with the benchmark."""

from __future__ import annotations

import json
import select
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

_ANSWER_S = 180.0


class SideProcess:
    """A context manager. Raises SystemExit with its last words where it gives no answer."""

    def __init__(self, command: Sequence[str], answer_s: float = _ANSWER_S, folder: Path | None = None) -> None:
        """``folder``: the one it is started in."""
        self._answer_s = answer_s
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, cwd=folder
        )

    def __enter__(self) -> SideProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()

    def ask(self, command: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command).encode() + b"\n")
        self._process.stdin.flush()
        return self.read_answer()

    def read_answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = b""
        if select.select([self._process.stdout], [], [], self._answer_s)[0]:
            line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"no answer within {self._answer_s:g} s; its last lines:\n{self.read_log()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def read_log(self) -> str:
        self._log.seek(0)
        return self._log.read().decode(errors="replace")[-2000:]
