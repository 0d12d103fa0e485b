"""The data pool: the window and its journal behind one lock.

The rollout side asks for work (``next_dispatch``) and reports it (``finish``, ``fail``, ``give_back``). The training
side (any thread) takes groups, accepts them into numbered batches or drops them, and after each step calls ``publish``
and then ``retire``, so that refills start on the weights just published. Policy version n is the parameters after n
steps; batch n is trained by the step that starts on version n.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Self, TypeVar

from forgejax.errors import ConfigError, DamagedGroupError, DamagedJournalError, PoolError, TrainingError
from forgejax.pool.codec import decode_group, encode_group
from forgejax.pool.journal import LOST_ATTEMPT, NOTHING, Acceptance, Consumption, Journal, Kind
from forgejax.pool.ledger import IN_FLIGHT_AT_END, Ledger, PoolSnapshot, TokenAccount
from forgejax.pool.window import Live, State, Taken, Window, WindowConfig
from forgejax.types import Dispatch, Group

DAMAGED = "damaged"
_READ_AHEAD = 16  # groups that are read at once; each can be megabytes
_T = TypeVar("_T")
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PoolConfig:
    """``take_timeout_s``: how long a batch may wait for one group. ``max_drop_batches``: k, where k * groups_per_step
    groups dropped in a row end the filling of a batch."""

    window: WindowConfig = field(default_factory=WindowConfig)
    take_timeout_s: float = 1800.0
    max_drop_batches: int = 4

    def __post_init__(self) -> None:
        if not 0 < self.take_timeout_s <= threading.TIMEOUT_MAX:
            raise ConfigError(f"take_timeout_s is {self.take_timeout_s}; expected seconds above 0, and not endless")
        if self.max_drop_batches < 1:
            raise ConfigError(f"max_drop_batches is {self.max_drop_batches}; expected at least 1")

    @property
    def max_drops_in_a_row(self) -> int:
        return self.max_drop_batches * self.window.groups_per_step


class Pool:
    """Build it with ``open``. Every method may be called from any thread.

    All but ``next_dispatch`` and ``close`` may wait for the disk: an event loop calls them in another thread.
    """

    def __init__(self, journal: Journal, config: PoolConfig, step: int) -> None:
        self._journal = journal
        self._config = config
        self._changed = threading.Condition()
        self._askers: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []
        self._closed = False
        self._started_at: dict[int, float] = {}
        self._retired_at = time.monotonic()
        self._version = self._next_step = step
        self._load(step)

    @classmethod
    def open(cls, journal: Journal, config: PoolConfig, *, resume_step: int = 0) -> Self:
        """Goes on from a checkpoint taken after ``resume_step`` steps (0: from the first parameters).

        Consumption of batch ``resume_step`` and later is void: those groups return in their old order. Finished groups
        are kept. Groups that were running are dispatched again, with the next attempt. Raises PoolError if the journal
        does not fit the checkpoint.
        """
        journal.resume(resume_step)
        return cls(journal, config, resume_step)

    @property
    def config(self) -> PoolConfig:
        return self._config

    @property
    def attempt(self) -> int:
        """The run attempt that holds the journal."""
        return self._journal.attempt

    @property
    def next_step(self) -> int:
        """The number of the next batch to fill."""
        with self._changed:
            return self._next_step

    # The rollout side.

    async def next_dispatch(self) -> Dispatch | None:
        """Waits until another group may be in flight; None once the pool is closed.

        A dispatch that was made is given even to a caller who has been cancelled meanwhile.
        """
        loop = asyncio.get_running_loop()
        while True:
            woken = loop.create_future()
            answered, dispatch = await see_through(asyncio.to_thread(self._ask, (loop, woken)))
            if answered:
                return dispatch
            caller = asyncio.current_task()
            if caller is not None and caller.cancelling():
                raise asyncio.CancelledError
            await woken

    def finish(self, group: Group, apart: Mapping[str, int] = NOTHING) -> None:
        """Accepts a finished group durably; ``apart``: see ``GroupSink``. Repeating a report changes nothing; a report
        of an attempt that was given up is counted as lost_attempt. Raises StorageFullError (report again once there is
        room) and PoolError."""
        payload = encode_group(group)
        dispatch = group.dispatch
        with self._changed:
            outcome = self._journal.finish(
                dispatch, task_id=group.task.id, payload=payload, sampled_tokens=group.sampled_tokens, apart=apart
            )
            if outcome == "accepted":
                self._window.finish(dispatch.index)
                self._ledger.finish(dispatch.index, group.sampled_tokens)
            self._end(dispatch, outcome, kept=group.sampled_tokens, counted=apart)

    def fail(self, dispatch: Dispatch, reason: str, sampled_tokens: int, apart: Mapping[str, int] = NOTHING) -> None:
        """Records that a group came to nothing: the window slides past it, its tokens count under ``reason``."""
        untrained = _add_counts(reason, sampled_tokens, apart)
        with self._changed:
            outcome = self._journal.fail(dispatch, reason=reason, untrained=untrained)
            if outcome == "accepted":
                self._window.fail(dispatch.index)
                self._ledger.fail(dispatch.index, reason)
            self._end(dispatch, outcome, kept=0, counted=untrained)

    def give_back(self, dispatch: Dispatch, sampled_tokens: int, apart: Mapping[str, int] = NOTHING) -> None:
        """Leaves a group that was cut off as a crash would: it waits for its next attempt. Its tokens count as
        in_flight_at_end."""
        untrained = _add_counts(IN_FLIGHT_AT_END, sampled_tokens, apart)
        with self._changed:
            outcome = self._journal.give_back(dispatch, untrained=untrained)
            if outcome == "accepted":
                self._window.give_back(dispatch.index)
            self._end(dispatch, outcome, kept=0, counted=untrained)

    # The training side.

    def take(self, timeout_s: float) -> Group | None:
        """Waits for the oldest finished group inside the window and takes it; None once the pool is closed.

        The caller must then ``accept`` or ``drop`` it. A group whose stored bytes are damaged is dropped on the way,
        all its tokens as DAMAGED. The wait is measured from the call or from the last batch that retired, whichever is
        later; past ``timeout_s`` it raises a TrainingError that names what blocks the head.
        """
        called_at = time.monotonic()
        while True:
            with self._changed:
                index = self._take(called_at, timeout_s)
            if index is None:
                return None
            try:
                return decode_group(self._journal.payload(index), index=index)
            except DamagedGroupError as error:
                self._drop_damaged(index, error)

    def accept(self, index: int, *, step: int, untrained: Mapping[str, int]) -> None:
        """Puts a taken group into batch ``step``; ``untrained``: its tokens that will not be trained, by reason."""
        with self._changed:
            self._consume(index, step, "taken", None, untrained)

    def drop(self, index: int, *, step: int, reason: str, untrained: Mapping[str, int]) -> None:
        """Gives a taken group up while batch ``step`` is filling; its slot is refilled at once. ``untrained`` must
        cover every sampled token of it."""
        with self._changed:
            self._consume(index, step, "dropped", reason, untrained)
            self._window.drop(index)
            self._wake()

    def await_quiet(self, timeout_s: float) -> bool:
        """Waits until no group runs and none may be dispatched before a batch retires; False once the pool is closed.

        Raises TrainingError past ``timeout_s``.
        """
        until = time.monotonic() + timeout_s
        with self._changed:
            while self._window.count(State.RUNNING) or self._window.dispatchable() is not None:
                if self._closed:
                    return False
                if (left := until - time.monotonic()) <= 0:
                    raise TrainingError(
                        f"the groups in flight did not all end within {timeout_s:g} s: {self._obstacle()}"
                    )
                self._changed.wait(left)
            return True

    def seal(self, step: int) -> None:
        """Batch ``step`` is complete; the next to fill is ``step + 1``."""
        with self._changed:
            self._require_filling(step)
            self._next_step = step + 1

    def publish(self, version: int) -> None:
        """Later dispatches start on this policy version."""
        with self._changed:
            if version < self._version:
                raise PoolError(f"version {version} is published after version {self._version}; versions only grow")
            self._version = version

    def retire(self, step: int) -> None:
        """The step that trained batch ``step`` has ended and its weights are published: its slots are refilled."""
        with self._changed:
            indices = self._ledger.retire(step)
            if not indices:
                raise PoolError(f"batch {step} cannot retire: no group in flight belongs to it")
            for index in indices:
                self._window.retire(index)
            self._retired_at = time.monotonic()
            self._wake()

    def rewind(self, step: int) -> None:
        """Goes back to the checkpoint after ``step`` steps, as ``open`` does, but running groups keep running.

        Batches below ``step`` count as retired, for the checkpoint holds them. Raises PoolError if the journal does not
        fit it.
        """
        with self._changed:
            self._journal.void(step)
            self._load(step)
            self._wake()

    def forget(self, step: int) -> int:
        """No checkpoint older than ``step`` is kept: frees the journal space of groups consumed before it.

        Gives the oldest version that tokens of any group were drawn by which is kept, running or still to come.
        """
        with self._changed:
            oldest = self._journal.forget(step)
            return self._version if oldest is None else min(oldest, self._version)

    def close(self) -> None:
        """Ends every wait: ``take`` and ``next_dispatch`` give None. Reports are still accepted. Idempotent."""
        with self._changed:
            self._closed = True
            self._wake()

    # The account.

    def count_tokens(self, reason: str, tokens: int, *, owner: str) -> None:
        """Counts, durably, the tokens that were sampled for one evaluation or probe, its ``owner``; once for each."""
        _require_count(reason, tokens)
        with self._changed:
            self._journal.count_tokens(reason, tokens, owner=owner)
            self._ledger.count_tokens(reason, tokens)

    def count_lost(self, drawn: Mapping[str, int]) -> None:
        """Counts as lost_attempt what earlier attempts at the run drew for owners that none of them reported any more.

        ``drawn``: their tokens by owner, from the records of whoever drew them. Before anything is dispatched.
        """
        with self._changed:
            self._ledger.count_tokens(LOST_ATTEMPT, self._journal.count_lost(drawn))

    def tokens(self) -> TokenAccount:
        """Tokens by fate."""
        with self._changed:
            return self._ledger.tokens(ended=self._closed)

    def snapshot(self) -> PoolSnapshot:
        with self._changed:
            window, ledger = self._window, self._ledger
            running, finished = window.count(State.RUNNING), window.count(State.FINISHED)
            return PoolSnapshot(
                version=self._version,
                head=window.head,
                in_flight=running + finished + window.count(State.TAKEN),
                waiting=window.count(State.WAITING),
                running=running,
                finished_waiting=finished,
                groups_dispatched=ledger.dispatched,
                groups_trained=ledger.trained,
                groups_dropped=dict(ledger.dropped),
                groups_failed=dict(ledger.failed),
                disorder_max=ledger.disorder_max,
                lag_max=ledger.lag_max,
                staleness_max=ledger.staleness_max,
            )

    def describe_filling(self) -> str:
        """How far the batch is that is being filled, for people who wait for it."""
        with self._changed:
            done, waiting = self._ledger.count_batch(self._next_step), self._window.count(State.FINISHED)
            further = f" (and {waiting} waiting)" if waiting else ""
            return f"{done} of {self._config.window.groups_per_step} groups done{further}"

    def check_integrity(self) -> None:
        """Raises PoolError if the window broke a law or an observed maximum is beyond its bound."""
        with self._changed:
            self._window.check_integrity()
            config = self._config.window
            for name, seen, bound in (
                ("disorder", self._ledger.disorder_max, config.max_disorder),
                ("lag", self._ledger.lag_max, config.max_lag),
            ):
                if bound is not None and seen > bound:
                    raise PoolError(f"{name} reached {seen}; the window allows {bound}")

    def _drop_damaged(self, index: int, error: DamagedGroupError) -> None:
        with self._changed:
            tokens = self._ledger.sampled_tokens(index)
            self._consume(index, self._next_step, "dropped", DAMAGED, {DAMAGED: tokens})
            self._window.drop(index)
            self._wake()
        _logger.warning("%s; it is dropped, its %d tokens count as %s, and the run goes on", error, tokens, DAMAGED)

    def _ask(self, asker: tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]) -> tuple[bool, Dispatch | None]:
        """Whether there is an answer now, and the answer; where there is none the asker will be woken."""
        with self._changed:
            if self._closed:
                return True, None
            index = self._window.dispatchable()
            if index is None:
                self._askers.append(asker)
                return False, None
            return True, self._dispatch(index)

    # Under the lock.

    def _end(self, dispatch: Dispatch, outcome: Acceptance, *, kept: int, counted: Mapping[str, int]) -> None:
        """What every report of a group does to the ledger. ``kept`` tokens are in its payload."""
        if outcome == "accepted":
            for reason, tokens in counted.items():
                self._ledger.count_tokens(reason, tokens)
            self._started_at.pop(dispatch.index, None)
        elif outcome == "lost":
            self._ledger.count_tokens(LOST_ATTEMPT, kept + sum(counted.values()))
        self._wake()

    def _take(self, called_at: float, timeout_s: float) -> int | None:
        while not self._closed and self._window.takeable() is None:
            left = max(called_at, self._retired_at) + timeout_s - time.monotonic()
            if left <= 0:
                raise TrainingError(f"no group could be taken for {timeout_s:g} s: {self._obstacle()}")
            self._changed.wait(left)
        if self._closed:
            return None
        place = self._window.take()
        self._places[place.index] = place
        return place.index

    def _load(self, step: int) -> None:
        """Sets the window and the ledger to what the journal says, with the batches below ``step`` trained."""
        rows, consumption = self._journal.groups(), self._journal.consumption()
        self._ledger = Ledger(rows, consumption, self._journal.untrained_tokens(), retired_before=step)
        consumed = {record.index for record in consumption}
        states = {"waiting": State.WAITING, "dispatched": State.RUNNING, "finished": State.FINISHED}
        self._window = Window(
            self._config.window,
            live=(
                Live(index=row.index, state=states[row.state], taken_before=row.taken_before)
                for row in rows
                if row.state in states and row.index not in consumed
            ),
            next_index=len(rows),
            taken=len(consumed),
        )
        self._places: dict[int, Taken] = {}
        self._version = self._next_step = step

    def _dispatch(self, index: int) -> Dispatch:
        dispatch = self._journal.dispatch(index, version=self._version, taken_before=self._window.taken)
        self._window.dispatch(index)
        self._ledger.dispatch(index, dispatch.version)
        self._started_at[index] = time.monotonic()
        return dispatch

    def _consume(self, index: int, step: int, kind: Kind, reason: str | None, untrained: Mapping[str, int]) -> None:
        self._require_filling(step)
        place = self._places.get(index)
        if place is None:
            raise PoolError(f"group {index} cannot be {kind}: it is not waiting for a verdict; take it first")
        sampled, not_trained = self._ledger.sampled_tokens(index), sum(untrained.values())
        least = sampled if kind == "dropped" else 0
        if min(untrained.values(), default=0) < 0 or not least <= not_trained <= sampled:
            raise PoolError(
                f"the verdict on group {index} ({kind}) leaves {dict(untrained)} tokens untrained; "
                f"expected {least} to {sampled} of its {sampled} sampled tokens"
            )
        record = Consumption(
            index=index,
            step=step,
            kind=kind,
            reason=reason,
            untrained=dict(untrained),
            disorder=place.disorder,
            lag=place.lag,
        )
        self._journal.consume(record)
        self._ledger.consume(record)
        del self._places[index]

    def _require_filling(self, step: int) -> None:
        if step != self._next_step:
            raise PoolError(f"batch {step} is not filling; the batch to fill is {self._next_step}")

    def _obstacle(self) -> str:
        """Why nothing can be taken, and what to do."""
        if self._window.waits_on_trainer():
            return (
                f"all {self._config.window.in_flight} groups in flight are in batches that have not retired; "
                "look at the training step, or raise in_flight"
            )
        head = self._window.head
        behind = f"{self._window.count(State.FINISHED)} finished groups wait behind it"
        if self._ledger.failed:
            counts = ", ".join(f"{reason} {count}" for reason, count in self._ledger.failed.most_common())
            behind = f"{behind}; groups that came to nothing so far: {counts}"
        since = self._started_at.get(head)
        if since is None:
            return (
                f"group {head} is next and was not asked for ({behind}); "
                "the rollouts ask for no work: look at their log"
            )
        return (
            f"group {head} blocks the head of the window; it has been running for {time.monotonic() - since:.0f} s "
            f"({behind}); look at its episodes, shorten the episode deadline, or raise take_timeout_s"
        )

    def _wake(self) -> None:
        self._changed.notify_all()
        for loop, asker in self._askers:
            if not loop.is_closed():
                loop.call_soon_threadsafe(_resolve, asker)
        self._askers.clear()


async def see_through(work: Awaitable[_T]) -> _T:
    """Awaits what must not be left half done: a caller who is cancelled meanwhile gets its result all the same."""
    task = asyncio.ensure_future(work)
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():
                raise
    return task.result()


def read_groups(journal: Journal) -> Iterator[Group]:
    """Every finished group that the journal still has whole, by index; damaged ones are told of and left out."""
    kept = journal.kept()
    for indices in (kept[start : start + _READ_AHEAD] for start in range(0, len(kept), _READ_AHEAD)):
        try:
            payloads = journal.payloads(indices)
        except DamagedJournalError:  # it does not say in which group
            payloads = {}
        for index in indices:
            try:
                yield decode_group(payloads.get(index) or journal.payload(index), index=index)
            except DamagedGroupError as error:
                _logger.warning("%s; it is left out", error)


def _resolve(asker: asyncio.Future[None]) -> None:
    if not asker.done():
        asker.set_result(None)


def _add_counts(reason: str, tokens: int, apart: Mapping[str, int]) -> dict[str, int]:
    _require_count(reason, tokens)
    return {**apart, reason: tokens + apart.get(reason, 0)}


def _require_count(reason: str, tokens: int) -> None:
    if not reason or tokens < 0:
        raise PoolError(f"{tokens} tokens under reason {reason!r}: expected a reason and a count of at least 0")
