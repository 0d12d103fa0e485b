"""Many engines behind one ``Engines``: server processes, on this machine or elsewhere."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any, Self, TypeVar

from forgejax.errors import EngineError, OverloadedError
from forgejax.rollout.fleet.archive import Archive
from forgejax.rollout.fleet.base import DrawnRequest, EngineAccount
from forgejax.rollout.fleet.books import ServerBooks
from forgejax.rollout.fleet.channel import Publication, Staged
from forgejax.rollout.fleet.config import RolloutConfig
from forgejax.rollout.fleet.process import Launch
from forgejax.rollout.fleet.registry import Registry
from forgejax.rollout.fleet.remote import UnservedError
from forgejax.rollout.fleet.replica import Replica
from forgejax.rollout.fleet.router import EngineLoad, Router
from forgejax.types import Completion, OnTokens, SampleRequest

_LOOK_S = 0.02
_SLACK_S = 30.0
_MOST_TRIES = 8
_MOST_SERVERS = 1_024
_T = TypeVar("_T")
_logger = logging.getLogger(__name__)


class ServerEngines:
    """``Engines`` over servers, in an event loop and thread of its own.

    The weights published last are kept on the host: a server that is new, or comes back, gets them before it is asked.
    A request whose server is lost goes to another one while nobody has been shown anything of it; its completion then
    carries the id that the other server knows it by, with ``~1`` behind it (``~2``, ...).
    """

    def __init__(
        self,
        config: RolloutConfig,
        params: Any,
        version: int,
        *,
        request_deadline_s: float,
        launches: Sequence[Launch] = (),
        former: Archive | None = None,
        prepare: Callable[[Any, int], Staged] | None = None,
    ):
        """``launches``: servers to be started, where ``config.engines`` does not name them. ``former``: the logs that
        none of them will write. ``prepare`` makes weights and their version ready for the servers; without it they are
        copied to this host. Raises EngineError where the servers' logs cannot be read."""
        self._config, self._deadline_s = config, request_deadline_s
        self._former = former if former is not None else Archive()
        own = Archive([launch.requests for launch in launches if launch.requests.exists()])
        self._inherited = own.inherited + self._former.inherited
        own.close()
        self._prepare = prepare if prepare is not None else functools.partial(Publication, folder=config.folder)
        self._served: Staged = self._prepare(params, version)
        self._coming: Staged | None = None  # while servers change to it
        self._router = Router()
        urls = config.engines if isinstance(config.engines, tuple) else ()
        self._replicas: list[Replica] = []
        for launch in launches:
            self._add(launch=launch)
        for url in urls:
            self._add(url=url)
        self._registry = Registry(self._admit, token=config.token, again_s=config.silence_s / 2)
        self._registered_port = -1
        self._fit_at = time.monotonic()
        self._publish_s = 0.0
        self._moved = self._unreachable = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="engines", daemon=True)
        self._watch: asyncio.Task[None] | None = None
        self._ending = False

    def __enter__(self) -> Self:
        self._thread.start()
        try:
            self._call(self._start(), self._config.start_s + _SLACK_S)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if not self._thread.is_alive():
            return
        try:
            self._call(self._end(), _SLACK_S * 2)
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(_SLACK_S)
            self._served.drop()
            self._former.close()
            if not self._thread.is_alive():
                self._loop.close()

    async def sample(self, request: SampleRequest, on_tokens: OnTokens | None = None) -> Completion:
        """See ``types.Sampler``. ``on_tokens`` is called in the thread of the engines."""
        if not self._thread.is_alive():
            raise EngineError(f"request {request.request_id}: the engines were stopped")
        asked = asyncio.run_coroutine_threadsafe(self._sample(request, on_tokens), self._loop)
        completion, books = await asyncio.wrap_future(asked)
        books.give(len(completion.token_ids))
        return completion

    def publish(self, params: Any, version: int) -> None:
        """See ``Engines``. A server that does not take the weights is not asked any more until it has them; where none
        takes them, EngineError names each with its reason, and the version before goes on being served."""
        began = time.monotonic()
        publication = self._prepare(params, version)
        try:
            self._call(self._publish(publication), self._config.publish_s * 3 + _SLACK_S)
        except BaseException:
            publication.drop()
            raise
        self._publish_s = time.monotonic() - began

    def account(self) -> EngineAccount:
        if self._thread.is_alive():
            self._call(self._refresh(), _SLACK_S)
        before = self._inherited
        total = EngineAccount(
            inherited=before.sampled, inherited_cancelled=before.cancelled, inherited_failed=before.failed
        )
        for replica in self._replicas:
            total += replica.count()
        return total

    def given_before(self) -> Mapping[str, int]:
        return self._inherited.given

    def requests_of(self, request_ids: Iterable[str]) -> Mapping[str, DrawnRequest]:
        wanted = list(request_ids)
        found = self._former.requests_of(wanted)
        answers = self._call(self._look_up(wanted), self._config.silence_s * 2 + _SLACK_S)
        for answer in answers:
            found |= answer or {}
        if any(answer is None for answer in answers):
            self._unreachable += len(wanted) - len(found)
        return found

    @property
    def damaged_requests(self) -> int:
        """See ``Engines``; those that only a server out of reach can know count as well."""
        damaged = self._former.damaged + self._unreachable
        for replica in self._replicas:
            status = replica.status
            damaged += status.damaged if status is not None else 0
            damaged += replica.archive.damaged if replica.archive is not None else 0
        return damaged

    def trim(self, version: int) -> None:
        self._former.trim(version)
        self._call(self._tell_all(lambda replica: replica.trim(version)), self._config.silence_s + _SLACK_S)

    def flush(self) -> None:
        self._call(self._tell_all(lambda replica: replica.flush()), self._config.silence_s + _SLACK_S)

    def figures(self) -> Mapping[str, float]:
        router = self._router
        figures = {
            "engine/publish_s": self._publish_s,
            "engine/serving": float(len(self._find_fit())),
            "engine/moved": float(self._moved),
            "engine/kept_share": router.kept / router.requests if router.requests else 0.0,
            "engine/expected_hit": router.expected_tokens / router.prompt_tokens if router.prompt_tokens else 0.0,
        }
        for replica in self._replicas:
            counts = replica.count()
            figures |= {
                f"replica_{replica.number}/active": float(counts.active),
                f"replica_{replica.number}/waiting": float(counts.waiting),
                f"replica_{replica.number}/sampled": float(counts.sampled),
                f"replica_{replica.number}/cache_hit": counts.cache_hit_rate,
                f"replica_{replica.number}/restarts": float(replica.restarts),
            }
        return figures

    @property
    def healthy(self) -> bool:
        watched = self._watch is None or not self._watch.done()
        return self._thread.is_alive() and watched and (self._may_come or not self._all_given_up)

    @property
    def registered_port(self) -> int:
        """Where servers may say that they are there; -1 where they may not, or not yet."""
        return self._registered_port

    @property
    def trouble(self) -> str:
        if self.healthy:
            return ""
        return f"no inference engine is left: {self._tell_troubles()}"

    # -- The engines' own event loop ---------------------------------------------------------------------------------

    async def _start(self) -> None:
        """Returns once every server serves or is known to be out of reach, and one of them serves."""
        if self._config.register_at:
            self._registered_port = await self._registry.open(*self._config.register_place)
        self._fit_at = time.monotonic()
        self._watch = asyncio.create_task(self._watch_on())
        began = time.monotonic()
        while True:
            fit, elsewhere = self._find_fit(), [each for each in self._replicas if each.launch is None and not each.up]
            late = elsewhere if time.monotonic() - began > self._config.silence_s else []
            waiting = [each for each in self._replicas if each not in fit and each not in late and not each.given_up]
            if not waiting and (fit or not self.healthy or (late and not self._may_come)):
                break
            await asyncio.sleep(_LOOK_S)
        for replica in self._replicas:
            if replica not in fit:
                _logger.warning("the run begins without %s: %s", replica.name, replica.trouble)
        if not fit:
            raise EngineError(
                f"no inference engine serves: {self._tell_troubles()}; correct that, or set rollout.engines"
            )

    def _add(self, *, launch: Launch | None = None, url: str = "") -> Replica:
        """One server more, nothing of which is known yet."""
        replica = Replica(
            number=len(self._replicas),
            config=self._config,
            request_deadline_s=self._deadline_s,
            wanted=lambda: self._served,
            on_empty=self._router.forget,
            launch=launch,
            url=url,
        )
        self._replicas.append(replica)
        return replica

    def _admit(self, url: str) -> None:
        """A server says that it is there. One that was given up may come again. Raises OverloadedError."""
        known = next((replica for replica in self._replicas if replica.url == url), None)
        if known is not None:
            known.welcome()
        elif len(self._replicas) >= _MOST_SERVERS:
            raise OverloadedError(f"{_MOST_SERVERS} servers are known to this run; it takes no more", _SLACK_S)
        else:
            _logger.warning("%s says that it is there", self._add(url=url).name)

    async def _watch_on(self) -> None:
        async def watch(replica: Replica) -> None:
            while not self._ending:
                try:
                    await replica.look()
                except EngineError as error:
                    await replica.lose(str(error))
                await asyncio.sleep(self._config.poll_s)

        try:
            async with asyncio.TaskGroup() as watches:
                watched = 0
                while not self._ending:
                    for replica in self._replicas[watched:]:
                        watches.create_task(watch(replica))
                    watched = len(self._replicas)
                    if self._find_fit():
                        self._fit_at = time.monotonic()
                    await asyncio.sleep(self._config.poll_s)
        except Exception:
            _logger.exception("the engines are not watched any more: the run cannot go on")
            raise

    @property
    def _all_given_up(self) -> bool:
        return all(replica.given_up for replica in self._replicas)

    @property
    def _may_come(self) -> bool:
        """Whether it is worth to wait for a server that nobody has named."""
        return bool(self._config.register_at) and time.monotonic() - self._fit_at < self._config.start_s

    def _tell_troubles(self) -> str:
        told = [f"{replica.name}: {replica.trouble}" for replica in self._replicas]
        place = self._config.register_at
        if place and not told:
            told = [f"none has said to {place} (rollout.register_at) that it is there"]
        return "; ".join(told)

    async def _end(self) -> None:
        self._ending = True
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
        await self._registry.close()
        await asyncio.gather(*(replica.close() for replica in self._replicas))

    def _find_fit(self) -> list[Replica]:
        """Those that serve the version published last; or the next one, while it is being published."""
        serials = {each.serial for each in (self._served, self._coming) if each is not None}
        return [replica for replica in self._replicas if replica.ready and replica.serial in serials]

    async def _sample(self, request: SampleRequest, on_tokens: OnTokens | None) -> tuple[Completion, ServerBooks]:
        until = time.monotonic() + self._deadline_s
        shown = False

        def show(ids: Sequence[int]) -> bool | None:
            nonlocal shown
            shown = True
            return on_tokens(ids) if on_tokens is not None else None

        for number in range(_MOST_TRIES):
            replica = await self._choose(request, until)
            name = f"{request.request_id}~{number}" if number else request.request_id
            try:
                return await replica.ask(dataclasses.replace(request, request_id=name), show)
            except UnservedError as error:
                if shown and on_tokens is not None and not request.repeatable:
                    raise
                why = error
                self._moved += 1
        raise EngineError(f"request {request.request_id} was lost with {_MOST_TRIES} engines; the last: {why}")

    async def _choose(self, request: SampleRequest, until: float) -> Replica:
        while not (fit := self._find_fit()):
            if not self.healthy or time.monotonic() > until:
                raise EngineError(f"request {request.request_id}: {self.trouble or 'no engine serves'}")
            await asyncio.sleep(_LOOK_S)
        loads = [
            EngineLoad(
                number=each.number,
                slots=each.status.slots if each.status is not None else 1,
                requests=max(each.open_requests, each.status.active + each.status.waiting if each.status else 0),
                tokens=each.open_tokens,
            )
            for each in fit
        ]
        return self._replicas[self._router.choose(request, loads)]

    async def _publish(self, publication: Staged) -> None:
        """All that serve get the weights, then all change to them; who fails has to catch up by itself."""
        until = time.monotonic() + self._config.publish_s
        failures: dict[Replica, EngineError] = {}
        targets = self._find_fit()
        for replica in targets:
            replica.publishing = True
        self._coming = publication
        try:
            stages = await _try_all(each.stage(publication) for each in targets)
            failures |= {each: end for each, end in zip(targets, stages, strict=True) if isinstance(end, EngineError)}
            transfers = {each: end for each, end in zip(targets, stages, strict=True) if isinstance(end, str)}
            ends = await _try_all(replica.commit(transfer) for replica, transfer in transfers.items())
            failures |= {each: end for each, end in zip(transfers, ends, strict=True) if isinstance(end, EngineError)}
            for replica, error in failures.items():
                _logger.warning("%s did not take version %d: %s", replica.name, publication.version, error)
            committed = len(targets) > len(failures)
            refused = bool(failures) and not any(isinstance(error, UnservedError) for error in failures.values())
            if not committed and (refused or not self.healthy):
                raise self._word_failure(publication, failures)
            before, self._served = self._served, publication
            try:
                while not self._find_fit():  # those that are coming back catch up with it
                    if not self.healthy or time.monotonic() > until:
                        self._served = before
                        raise self._word_failure(publication, failures)
                    await asyncio.sleep(_LOOK_S)
            finally:
                if self._served is publication:
                    before.drop()
        finally:
            self._coming = None
            for replica in targets:
                replica.publishing = False

    def _word_failure(self, publication: Staged, failures: Mapping[Replica, Exception]) -> EngineError:
        told = {replica: replica.trouble or "it has not caught up" for replica in self._replicas} | dict(failures)
        said = "; ".join(f"{replica.name}: {why}" for replica, why in told.items())
        return EngineError(
            f"no engine took the weights of version {publication.version}; version {self._served.version} is served "
            f"as before. {said}"
        )

    async def _refresh(self) -> None:
        await asyncio.gather(*(replica.refresh() for replica in self._replicas))

    async def _look_up(self, wanted: Sequence[str]) -> list[dict[str, DrawnRequest] | None]:
        return list(await asyncio.gather(*(replica.requests_of(wanted) for replica in self._replicas)))

    async def _tell_all(self, tell: Callable[[Replica], Coroutine[Any, Any, None]]) -> None:
        await asyncio.gather(*(tell(replica) for replica in self._replicas))

    def _call(self, work: Coroutine[Any, Any, _T], deadline_s: float) -> _T:
        """Runs it on the engines' loop, for another thread."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(deadline_s)
        except FutureTimeoutError as error:
            future.cancel()
            raise EngineError(f"the engines did not answer within {deadline_s:g} s") from error


async def _try_all(work: Iterable[Coroutine[Any, Any, _T]]) -> list[_T | EngineError]:
    """The results, or the EngineErrors in their places."""
    results: list[_T | EngineError] = []
    for result in await asyncio.gather(*work, return_exceptions=True):
        if isinstance(result, BaseException) and not isinstance(result, EngineError):
            raise result
        results.append(result)
    return results
