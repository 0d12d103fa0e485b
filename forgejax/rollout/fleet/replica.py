"""One server of a run as the trainer sees it: whether it can be asked, what it serves, and what becomes of it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from forgejax.errors import EngineError
from forgejax.rollout.fleet.archive import Archive, copy_archive
from forgejax.rollout.fleet.base import DrawnRequest, EngineAccount
from forgejax.rollout.fleet.books import ServerBooks
from forgejax.rollout.fleet.channel import Staged
from forgejax.rollout.fleet.config import RolloutConfig
from forgejax.rollout.fleet.process import Launch, ServerProcess
from forgejax.rollout.fleet.remote import UnservedError
from forgejax.rollout.fleet.remote_engine import RemoteEngine
from forgejax.rollout.server.admin import StatusBody
from forgejax.types import Completion, OnTokens, SampleRequest

_logger = logging.getLogger(__name__)


@dataclass(kw_only=True, eq=False)
class _Call:
    task: asyncio.Task[Completion]
    tokens: int
    why: str = ""  # it was broken off


@dataclass(kw_only=True, eq=False)
class Replica:
    """Server ``number``: started by ``launch``, or elsewhere at ``url``. Belongs to one event loop.

    ``wanted`` gives the publication that it should serve, ``on_empty`` is told when its prefix cache is empty.
    ``serial`` is the publication it serves (0: none of ours), ``trouble`` why it is not asked.
    """

    number: int
    config: RolloutConfig
    request_deadline_s: float
    wanted: Callable[[], Staged]
    on_empty: Callable[[int], None]
    launch: Launch | None = None
    url: str = ""
    serial: int = 0
    restarts: int = 0
    given_up: bool = False
    publishing: bool = False  # to it, by whoever has all in hand
    trouble: str = "it has not been heard of"
    books: list[ServerBooks] = field(default_factory=list)
    archive: Archive | None = None  # of its log, while no process has it
    process: ServerProcess | None = None
    sampler: RemoteEngine | None = None
    _up: bool = False
    _suspect: bool = False
    _status: StatusBody | None = None
    _heard_at: float = field(default_factory=time.monotonic)
    _served_at: float = field(default_factory=time.monotonic)
    _serials: dict[str, int] = field(default_factory=dict)  # of transfers
    _commits: int = 0
    _catching_up: asyncio.Task[None] | None = None
    _calls: set[_Call] = field(default_factory=set)

    @property
    def name(self) -> str:
        return f"engine {self.number}" + (f" ({self.url})" if self.url else "")

    @property
    def up(self) -> bool:
        """Whether it has been heard of lately, whatever it serves."""
        return self._up and not self._suspect

    @property
    def ready(self) -> bool:
        """Whether it takes requests; for what, ``serial`` says."""
        return self.up and self._status is not None and self._status.state == "serving"

    @property
    def status(self) -> StatusBody | None:
        """What it said last."""
        return self._status

    @property
    def open_requests(self) -> int:
        return len(self._calls)

    @property
    def open_tokens(self) -> int:
        """Those of the prompts of its open requests, and what was drawn for them."""
        return sum(call.tokens for call in self._calls)

    def count(self) -> EngineAccount:
        """The account of all its processes."""
        total = EngineAccount()
        for books in self.books:
            total += books.count(self.open_requests, reached=self._up)
        return total

    # -- Requests ----------------------------------------------------------------------------------------------------

    async def ask(self, request: SampleRequest, on_tokens: OnTokens | None) -> tuple[Completion, ServerBooks]:
        """A completion, and the books that it has to be entered in once it is handed over.

        Raises UnservedError where another engine may serve the request, EngineError where none will.
        """
        assert self.sampler is not None and self._status is not None
        books, seen = self.books[-1], 0

        def count(ids: Sequence[int]) -> bool | None:
            nonlocal seen
            seen += len(ids)
            call.tokens += len(ids)
            return None if on_tokens is None else on_tokens(ids)

        task = asyncio.create_task(self.sampler.sample(request, count, instance=self._status.instance))
        call = _Call(task=task, tokens=len(request.prompt_ids))
        self._calls.add(call)
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            raise
        finally:
            self._calls.discard(call)
        if task.cancelled():
            books.break_off(request.request_id, seen)
            raise UnservedError(f"request {request.request_id}: {self.name} is lost: {call.why}")
        error = task.exception()
        if isinstance(error, EngineError):
            books.break_off(request.request_id, seen)
            if isinstance(error, UnservedError):
                self._suspect = True
            elif not await self._confirm():
                raise UnservedError(str(error)) from error
        return task.result(), books

    async def _confirm(self) -> bool:
        """Whether it still takes requests."""
        assert self.sampler is not None
        try:
            status = await self.sampler.status()
        except EngineError:
            status = None
        self._suspect = status is None or not status.healthy or status.state != "serving"
        return not self._suspect

    # -- Weights -----------------------------------------------------------------------------------------------------

    async def stage(self, publication: Staged) -> str:
        """Brings it weights that it does not serve yet; gives the transfer. Raises EngineError."""
        if self.sampler is None:
            raise EngineError("it has no address yet")
        transfer = await publication.stage(self.sampler, within_s=self.config.publish_s)
        self._serials = {**dict(list(self._serials.items())[-3:]), transfer: publication.serial}
        return transfer

    async def commit(self, transfer: str) -> None:
        """Has it serve what was staged. Raises EngineError."""
        assert self.sampler is not None
        await self.sampler.commit(transfer, within_s=self.config.publish_s)
        self.serial = self._serials[transfer]
        self._commits += 1
        self.on_empty(self.number)

    async def abort(self, transfer: str) -> None:
        """Has it forget what was staged, if it can be reached."""
        assert self.sampler is not None
        with contextlib.suppress(EngineError):
            await self.sampler.abort(transfer)

    async def _catch_up(self) -> None:
        publication = self.wanted()
        try:
            await self.commit(await self.stage(publication))
        except EngineError as error:
            _logger.warning("%s could not catch up with version %d: %s", self.name, publication.version, error)
            await asyncio.sleep(self.config.poll_s)

    # -- Life --------------------------------------------------------------------------------------------------------

    def welcome(self) -> None:
        """It says by itself that it is there: if it was given up, it is asked again."""
        if self.given_up:
            self.given_up, self._served_at = False, time.monotonic()

    async def look(self) -> None:
        """Asks it how it is, and does what that calls for: to be called every ``poll_s``."""
        if self.given_up:
            return
        if self.launch is not None and self.process is None:
            self._start()
        if self.process is not None and (end := self.process.describe_end()):
            await self.lose(end)
            return
        now, commits = time.monotonic(), self._commits
        status = await self._hear()
        if status is not None:
            self._heard_at = now
            await self._take(status, commits)
        elif self._up and time.monotonic() - self._heard_at > self.config.silence_s:
            await self.lose(f"it has given no sign of life for {self.config.silence_s:g} s")
        if self.ready and self.serial == self.wanted().serial:
            self._served_at, self.trouble = now, ""
        elif now - self._served_at > self.config.start_s:
            await self.lose(f"it has not served for {self.config.start_s:g} s")
            self.given_up = True

    async def lose(self, why: str) -> None:
        """Breaks off its requests, closes the books of its process and, where it is ours, ends that for good."""
        self._up, self.serial, self.trouble = False, 0, why
        _logger.warning("%s is lost: %s", self.name, why)
        for call in tuple(self._calls):
            call.why = why
            call.task.cancel()
        self.on_empty(self.number)
        if self._catching_up is not None:
            self._catching_up.cancel()
            self._catching_up = None
        if self.process is None or self.launch is None:
            return
        await asyncio.sleep(0)  # the requests that were broken off enter the books
        await asyncio.to_thread(self.process.kill)
        self.process, self._status = None, None
        await self._close_sampler()
        await self._read_log()
        self.restarts += 1
        if self.restarts > self.config.max_restarts:
            self.given_up = True
            _logger.error("%s is given up after %d restarts: %s", self.name, self.config.max_restarts, why)

    async def close(self) -> None:
        """Ends a process of ours in an orderly way; a server elsewhere goes on."""
        if self._catching_up is not None:
            self._catching_up.cancel()
        await self._close_sampler()
        if self.process is not None:
            await asyncio.to_thread(self.process.end)
        if self.archive is not None:
            self.archive.close()

    def _start(self) -> None:
        assert self.launch is not None
        self.url, self._served_at = "", time.monotonic()
        self.process = ServerProcess(self.launch)

    async def _hear(self) -> StatusBody | None:
        if self.process is not None and not self.url:
            self.url = self.process.address
        if not self.url:
            return None
        if self.sampler is None:
            sampler = RemoteEngine(
                self.url,
                request_deadline_s=self.request_deadline_s,
                silence_s=self.config.silence_s,
                token=self.config.token,
            )
            self.sampler = await sampler.__aenter__()
        try:
            return await self._ask_status(self.config.silence_s / 2)
        except (TimeoutError, EngineError) as error:
            self.trouble = f"it does not answer: {error}" if str(error) else "it does not answer"
            return None

    async def _take(self, status: StatusBody, commits: int) -> None:
        """What it says of itself; after a change of its process, of another one."""
        if not self.books or self.books[-1].instance != status.instance:
            if self.books and self.launch is None:
                await self.lose("another server process has taken its place")
                self.books[-1].close(None, lambda _: False)
            self.books.append(ServerBooks(status))
            self.serial = 0
            if self.archive is not None:
                self.archive.close()
                self.archive = None
        self._status, self.books[-1].last = status, status
        self._up, self._suspect = True, False
        self.trouble = f"it is {status.state}"
        if not status.healthy:
            await self.lose("its engine has failed; its log says why")
            return
        if commits == self._commits:  # else it said this before its last change
            self.serial = self._serials.get(status.publication, 0)
        behind = self.serial != self.wanted().serial and not self.publishing
        if behind and (self._catching_up is None or self._catching_up.done()):
            self._catching_up = asyncio.create_task(self._catch_up())

    async def _ask_status(self, within_s: float) -> StatusBody:
        assert self.sampler is not None
        async with asyncio.timeout(within_s):  # wait_for would lose a cancellation that comes with the answer
            return await self.sampler.status()

    async def refresh(self) -> None:
        """Brings its counts up to now, where it answers."""
        if self.up and self.sampler is not None and self.books:
            books = self.books[-1]
            with contextlib.suppress(EngineError, TimeoutError):
                status = await self._ask_status(4 * self.config.poll_s)
                if status.instance == books.instance:
                    books.last = status

    # -- Its records -------------------------------------------------------------------------------------------------

    async def requests_of(self, request_ids: Sequence[str]) -> dict[str, DrawnRequest] | None:
        """What it recorded of these requests, from its log where it is gone; None where that is out of reach."""
        if self.archive is not None:
            return await asyncio.to_thread(self.archive.requests_of, request_ids)
        if not self.books:
            return {}
        if self.up and self.sampler is not None:
            with contextlib.suppress(UnservedError):
                return await self.sampler.requests_of(request_ids)
        return None

    async def flush(self) -> None:
        """See ``Engines``. A server that is lost has written what it said had ended. Raises EngineError."""
        if self.up and self.sampler is not None:
            with contextlib.suppress(UnservedError):
                await self.sampler.flush()

    async def trim(self, version: int) -> None:
        """See ``Engines``."""
        if self.up and self.sampler is not None:
            with contextlib.suppress(EngineError):
                await self.sampler.trim(version)

    async def _read_log(self) -> None:
        """Closes the books of a process of ours that is no more, by its log."""
        assert self.launch is not None
        try:
            archive = await asyncio.to_thread(copy_archive, self.launch.requests)
        except (EngineError, OSError) as error:
            _logger.warning("%s: its log cannot be read: %s", self.name, error)
            archive = Archive()
        if self.books:
            self.books[-1].close(archive.inherited.sampled, lambda name: name in archive.requests_of([name]))
        self.archive = archive

    async def _close_sampler(self) -> None:
        if self.sampler is not None:
            await self.sampler.__aexit__(None, None, None)
            self.sampler = None
