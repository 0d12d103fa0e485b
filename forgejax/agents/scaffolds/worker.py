"""Long-lived agent processes: many episodes at once as JSON lines, for agents that are slow to start.

The contract of a worker program:

- it prints ``{"ready": true}`` once it can take episodes;
- it reads lines ``{"id", "question", "base_url", "api_key"}`` from stdin until the end of it, then exits;
- it prints ``{"id", "answer"}`` or ``{"id", "error"}`` for each, in any order. An error may come with a
  ``"stop_reason"``: ``"truncated"`` (the model ran out of context) or ``"environment_failed"`` (a tool or the server
  failed); otherwise the agent counts as failed. Whatever it has to say to people goes to stderr;
- a request for the model may fail with status 410: the episode's session is closed, its deadline has passed or the run
  is ending, and nothing more will be answered under its key. Drop the episode; what is printed for it then is ignored.

A worker that dies is started again; its open episodes are cut off by one accident, which is nobody's failure, and so
is an episode that ran out of time while its worker was being started again.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import deque
from dataclasses import replace

from forgejax.agents.scaffolds.base import AgentConfig, AgentResult, EpisodeSpec
from forgejax.agents.scaffolds.children import (
    STDERR_SHOWN,
    Child,
    Guard,
    find_program,
    merge_environment,
    quote_command,
    spawn,
)
from forgejax.errors import AgentError
from forgejax.types import StopReason

LINE_BYTES = 1024 * 1024
MUTE_DEADLINES = 8  # deadlines in a row without a line in between: the worker hangs and is restarted
COMPLAINTS = 5  # lines reported per process; the rest is counted
LINE_SHOWN = 200  # characters of a line that a message quotes
BACKOFF_S = 0.1
ERROR_REASONS = (StopReason.TRUNCATED, StopReason.ENVIRONMENT_FAILED)
_log = logging.getLogger(__name__)


class WorkerScaffold:
    """``config.workers`` processes of ``config.command``; each episode goes to the least busy one that is ready."""

    def __init__(self, config: AgentConfig) -> None:
        self._config = config
        self._guard: Guard | None = None
        self._workers: list[_Worker] = []

    async def start(self) -> None:
        find_program(self._config.command)
        self._guard = Guard()
        self._workers = [_Worker(self._config, self._guard.marker) for _ in range(self._config.workers)]
        problems = await asyncio.gather(*(worker.start() for worker in self._workers), return_exceptions=True)
        for problem in problems:
            if problem is not None:
                await self.close()
                raise problem

    def check(self) -> None:
        """Raises AgentError once every worker is broken; until then the others take its episodes."""
        broken = [worker.broken for worker in self._workers if worker.broken is not None]
        if broken and len(broken) == len(self._workers):
            raise broken[0]

    async def run(self, episode: EpisodeSpec) -> AgentResult:
        if not self._workers:
            raise AgentError("the agent scaffold is not started; await start() first")
        usable = [worker for worker in self._workers if worker.broken is None]
        if not usable:
            return _failed(str(self._workers[0].broken))
        worker = min(usable, key=lambda worker: (not worker.ready.is_set(), len(worker.open)))
        return await worker.run(episode)

    async def close(self) -> None:
        await asyncio.gather(*(worker.close() for worker in self._workers))
        self._workers = []
        if self._guard is not None:
            await asyncio.to_thread(self._guard.close)
            self._guard = None


class _Worker:
    """One process, restarted when it dies. ``open`` holds the episodes it owes a result."""

    def __init__(self, config: AgentConfig, marker: str) -> None:
        self._config = config
        self._env = merge_environment(config.env, marker)
        self._process: Child | None = None
        self._line = bytearray()  # the beginning of a line whose end has not come
        self._supervisor: asyncio.Task[None] | None = None
        self._expired: deque[str] = deque(maxlen=1024)
        self._deaths = 0  # in a row, without a result in between
        self._mute = 0
        self._complaints = 0
        self._killed_for = ""
        self._said_ready = asyncio.Event()
        self.ready = asyncio.Event()
        self.open: dict[str, asyncio.Future[AgentResult]] = {}
        self.broken: AgentError | None = None

    async def start(self) -> None:
        """Waits until the process is ready; raises AgentError with its stderr where it is not."""
        process = await self._launch()
        self._supervisor = asyncio.create_task(self._supervise(process))

    async def run(self, episode: EpisodeSpec) -> AgentResult:
        if episode.id in self.open:
            return _failed(f"episode id {episode.id} is already open in this worker; ids must be unique")
        result = self.open[episode.id] = asyncio.get_running_loop().create_future()
        waited = not self.ready.is_set()
        try:
            async with asyncio.timeout(episode.deadline_s):
                await self._send(episode)
                began_at = time.monotonic() if waited else None
                return replace(await result, began_at=began_at)
        except TimeoutError:
            error = f"agent worker {quote_command(self._config.command)} gave no answer within {episode.deadline_s:g} s"
            if waited:
                return _cut_off(f"{error}, in which it waited for its worker to be started again")
            if self._process is not None:
                error = f"{error}; {self._process.stderr_note}"
            self._note_deadline()
            return AgentResult(error=error, stop_reason=StopReason.DEADLINE)
        finally:
            del self.open[episode.id]
            self._expired.append(episode.id)

    async def close(self) -> None:
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.wait({self._supervisor})
            self._supervisor = None
        if self._process is not None:
            await self._process.stop()
            self._process = None
        self._end_open(_failed("the agent scaffold was closed"))

    async def _send(self, episode: EpisodeSpec) -> None:
        await self.ready.wait()
        if self.broken is not None or episode.id not in self.open or self.open[episode.id].done():
            return  # the result is there already: the worker broke while the episode waited for it
        assert self._process is not None
        fields = {"id": episode.id, "question": episode.question}
        line = json.dumps(fields | {"base_url": episode.base_url, "api_key": episode.api_key})
        await self._process.write(line.encode() + b"\n")

    async def _launch(self) -> Child:
        """Starts the process and waits for its ready line; AgentError where it does not come."""
        self._line.clear()
        self._mute = self._complaints = 0
        self._said_ready.clear()
        process = self._process = await spawn(self._config.command, self._env, stdin=True, on_output=self._take_output)
        waits = [asyncio.create_task(event.wait()) for event in (self._said_ready, process.exited)]
        try:
            await asyncio.wait(waits, timeout=self._config.start_timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        if not self._said_ready.is_set():
            timeout = f'printed no {{"ready": true}} within {self._config.start_timeout_s:g} s'
            how = f"ended with status {process.status}" if process.exited.is_set() else timeout
            await process.stop()
            raise AgentError(f"agent worker {quote_command(self._config.command)} {how}; {process.stderr_note}")
        self.ready.set()
        return process

    async def _supervise(self, process: Child) -> None:
        """Restarts the process whenever it ends, until it dies too often in a row."""
        while True:
            await process.exited.wait()
            self.ready.clear()
            await process.stop()
            error = f"agent worker {quote_command(self._config.command)} ended with status {process.status}"
            error = f"{error}{self._killed_for}; {process.stderr_note}"
            self._killed_for = ""
            restarted = None
            while restarted is None:
                self._deaths += 1
                self._end_open(_cut_off(error))
                if self._deaths > self._config.max_restarts:
                    self._break(error)
                    return
                _log.warning("%s; restart %d of %d", error, self._deaths, self._config.max_restarts)
                await asyncio.sleep(BACKOFF_S * 2**self._deaths)
                try:
                    restarted = await self._launch()
                except AgentError as problem:
                    error = str(problem)
            process = restarted

    def _take_output(self, data: bytes) -> None:
        """Splits stdout into lines. A process that prints a line too long to be a result is ended."""
        *lines, rest = (self._line + data).split(b"\n")
        self._line = rest
        for line in lines:
            if line.strip():
                self._take_line(bytes(line))
        if len(rest) > LINE_BYTES and self._process is not None:
            what = f"a line of more than {LINE_BYTES} bytes"
            self._complain(f"{what}; restarting it")
            self._line = bytearray()
            self._kill(f"it printed {what}")

    def _take_line(self, line: bytes) -> None:
        self._mute = 0
        message = _parse(line)
        if message is None:
            self._complain(f"a line that is no JSON object: {line[:LINE_SHOWN]!r}")
            return
        if message.get("ready") is True:
            self._said_ready.set()
            return
        name = message.get("id")
        if isinstance(name, str) and name in self.open:
            if not self.open[name].done():
                self.open[name].set_result(_result(message, quote_command(self._config.command)))
            self._deaths = 0
        elif name not in self._expired:
            self._complain(f"a result for an unknown id: {line[:LINE_SHOWN]!r}")

    def _note_deadline(self) -> None:
        self._mute += 1
        if self._mute >= MUTE_DEADLINES and self._process is not None and self.ready.is_set():
            why = f"{self._mute} deadlines in a row passed without a line from it"
            _log.warning("agent worker: %s; restarting it", why)
            self._mute = 0
            self._kill(why)

    def _kill(self, why: str) -> None:
        assert self._process is not None
        self._killed_for = f", killed since {why}"
        self._process.kill()

    def _break(self, error: str) -> None:
        self.broken = AgentError(f"{error}\nIt ended {self._deaths} times in a row without giving a result.")
        _log.error("%s; it is not started again", self.broken)
        self._end_open(_failed(str(self.broken)))
        self.ready.set()  # lets waiting episodes see that it is broken

    def _end_open(self, ended: AgentResult) -> None:
        for result in self.open.values():
            if not result.done():
                result.set_result(ended)

    def _complain(self, what: str) -> None:
        self._complaints += 1
        if self._complaints <= COMPLAINTS:
            last = " (further ones are not reported)" if self._complaints == COMPLAINTS else ""
            _log.warning("agent worker %s printed %s%s", quote_command(self._config.command), what, last)


def _parse(line: bytes) -> dict[str, object] | None:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) else None


def _result(message: dict[str, object], command: str) -> AgentResult:
    """A worker's line as a result; what breaks the contract is a failed agent."""
    answer, error = message.get("answer"), message.get("error")
    if error is not None:
        named = [reason for reason in ERROR_REASONS if message.get("stop_reason") == reason.value]
        reason = named[0] if named else StopReason.AGENT_FAILED
        return AgentResult(error=f"agent worker {command} reports: {str(error)[:STDERR_SHOWN]}", stop_reason=reason)
    if "answer" not in message or not isinstance(answer, str | None):
        printed = str(message)[:LINE_SHOWN]
        return _failed(f'agent worker {command} printed {printed}; expected "answer" with a string or null, or "error"')
    return AgentResult(answer=answer)


def _cut_off(error: str) -> AgentResult:
    return AgentResult(error=error, stop_reason=StopReason.ENVIRONMENT_FAILED, accident=True)


def _failed(error: str) -> AgentResult:
    return AgentResult(error=error, stop_reason=StopReason.AGENT_FAILED)
