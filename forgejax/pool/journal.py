"""The durable record of the data pool: a SQL database behind SQLAlchemy Core.

What a method has written when it returns survives a crash of the process and of the machine. Only the trainer with the
newest run attempt may write: opening the journal claims attempt = previous + 1, and every later write of an older
attempt raises PoolError. Methods may be called from any thread.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, Self

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from forgejax.errors import DamagedGroupError, DamagedJournalError, PoolError
from forgejax.pool import schema
from forgejax.types import Dispatch

LOST_ATTEMPT = "lost_attempt"
NOTHING: Mapping[str, int] = MappingProxyType({})
GroupState = Literal["waiting", "dispatched", "finished", "failed"]
Kind = Literal["taken", "dropped"]
Acceptance = Literal["accepted", "repeated", "lost"]


@dataclass(frozen=True, kw_only=True)
class GroupRow:
    """A group's newest attempt. ``taken_before``: groups taken, in its lineage, when it was dispatched."""

    index: int
    attempt: int
    version: int
    state: GroupState
    taken_before: int
    sampled_tokens: int
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class Consumption:
    """A group's place in batch ``step``, or its drop while that batch was filling."""

    index: int
    step: int
    kind: Kind
    reason: str | None
    untrained: Mapping[str, int]
    disorder: int
    lag: int


class Journal:
    """An open journal that holds the newest run attempt. Build it with ``open``."""

    def __init__(self, engine: Engine, attempt: int) -> None:
        self._engine = engine
        self._writer = engine.execution_options(**{schema.WRITES: True})
        self.attempt = attempt

    @classmethod
    def open(cls, url: str) -> Self:
        """Opens or creates the journal at a SQLAlchemy URL and fences off every earlier attempt.

        Raises ConfigError for a URL that cannot be used, PoolError for a file that is not a journal.
        """
        engine = schema.connect(url)
        try:
            with schema.errors(), engine.execution_options(**{schema.WRITES: True}).begin() as connection:
                schema.tables.create_all(connection)
                attempt = _claim(connection)
        except PoolError:
            engine.dispose()
            raise
        return cls(engine, attempt)

    def close(self) -> None:
        self._engine.dispose()

    def resume(self, step: int) -> None:
        """Voids the consumption of ``step`` and later; dispatched, unfinished groups wait for their next attempt.

        Raises PoolError if the journal no longer or never held what a checkpoint at ``step`` goes on from.
        """
        with self._write() as connection:
            self._check_step(connection, step)
            _void(connection, step, self.attempt)
            connection.execute(
                sa.update(schema.groups)
                .where(schema.groups.c.state == "dispatched")
                .values(state="waiting", attempt=schema.groups.c.attempt + 1)
            )

    def void(self, step: int) -> None:
        """Voids the consumption of ``step`` and later; what runs goes on running. Raises PoolError like ``resume``."""
        with self._write() as connection:
            self._check_step(connection, step)
            _void(connection, step, self.attempt)

    def dispatch(self, index: int, *, version: int, taken_before: int) -> Dispatch:
        """Records that a new or waiting group starts; gives it its attempt."""
        started = {"state": "dispatched", "version": version, "taken_before": taken_before}
        with self._write() as connection:
            row = _row(connection, index)
            if row is None:
                connection.execute(sa.insert(schema.groups).values(index=index, attempt=0, sampled_tokens=0, **started))
                return Dispatch(index=index, attempt=0, version=version)
            if row.state != "waiting":
                raise PoolError(f"group {index} is {row.state} in the journal and cannot be dispatched")
            connection.execute(sa.update(schema.groups).where(schema.groups.c.index == index).values(**started))
            return Dispatch(index=index, attempt=row.attempt, version=version)

    def finish(
        self,
        dispatch: Dispatch,
        *,
        task_id: str,
        payload: bytes,
        sampled_tokens: int,
        apart: Mapping[str, int] = NOTHING,
    ) -> Acceptance:
        """Accepts a finished group, and counts by reason what was sampled for it ``apart`` from its episodes.

        "repeated": it was reported before, nothing changes. "lost": its attempt was given up, so it is not kept and its
        tokens are counted as lost_attempt. Raises PoolError for a group that was never dispatched so, or has failed.
        """
        values = {"state": "finished", "task_id": task_id, "sampled_tokens": sampled_tokens}
        return self._end(dispatch, values, kept=sampled_tokens, counted=apart, payload=payload)

    def fail(self, dispatch: Dispatch, *, reason: str, untrained: Mapping[str, int]) -> Acceptance:
        """Records that a group came to nothing for ``reason``, and counts its tokens. Outcomes as in ``finish``."""
        return self._end(dispatch, {"state": "failed", "reason": reason}, kept=0, counted=untrained)

    def give_back(self, dispatch: Dispatch, *, untrained: Mapping[str, int]) -> Acceptance:
        """Has a group that was cut off wait for its next attempt, as ``resume`` does after a crash, and counts its
        tokens by reason. Outcomes as in ``finish``."""
        return self._end(dispatch, {"state": "waiting", "attempt": dispatch.attempt + 1}, kept=0, counted=untrained)

    def consume(self, consumption: Consumption) -> None:
        """Records that a group entered a batch or was dropped. Raises PoolError if it already has in this lineage."""
        values = {name: getattr(consumption, name) for name in Consumption.__dataclass_fields__}
        values["untrained"] = dict(consumption.untrained)
        with self._write() as connection:
            connection.execute(sa.insert(schema.consumption).values(run_attempt=self.attempt, **values))

    def count_tokens(self, reason: str, tokens: int, *, owner: str) -> None:
        """Counts tokens that were sampled for an owner outside any group, once. They will not be trained."""
        with self._write() as connection:
            _count(connection, self.attempt, owner, {reason: tokens})

    def count_lost(self, drawn: Mapping[str, int]) -> int:
        """Counts as lost_attempt what was drawn for owners whose tokens nobody ever reported; gives how many it were.

        ``drawn``: tokens by owner, of ends that lie behind. An owner is reported once any of its tokens are counted, or
        if it is the newest attempt of a group that is finished.
        """
        newest = sa.select(schema.groups.c.index, schema.groups.c.attempt).where(schema.groups.c.state == "finished")
        with self._write() as connection:
            reported = set(connection.scalars(sa.select(schema.untrained_tokens.c.owner).distinct()))
            for index, attempt in connection.execute(newest):
                reported.add(Dispatch(index=index, attempt=attempt, version=0).owner)
            lost = {owner: tokens for owner, tokens in drawn.items() if owner and tokens and owner not in reported}
            for owner, tokens in lost.items():
                _count(connection, self.attempt, owner, {LOST_ATTEMPT: tokens})
        return sum(lost.values())

    def forget(self, step: int) -> int | None:
        """Frees the bytes of groups consumed before ``step``; a resume from an earlier step is refused from now on.

        Gives the oldest version that a group started on which is kept or running; None where there is no such group.
        """
        with self._write() as connection:
            already = connection.scalar(sa.select(schema.fence.c.forgotten_before)) or 0
            past = sa.select(schema.consumption.c.index).where(
                schema.consumption.c.voided_by.is_(None),
                schema.consumption.c.step >= already,
                schema.consumption.c.step < step,
            )
            connection.execute(
                sa.update(schema.groups)
                .where(schema.groups.c.index.in_(past), schema.groups.c.payload.is_not(None))
                .values(payload=None)
            )
            connection.execute(
                sa.update(schema.fence).where(schema.fence.c.forgotten_before < step).values(forgotten_before=step)
            )
            kept = schema.groups.c.payload.is_not(None) | (schema.groups.c.state == "dispatched")
            oldest: int | None = connection.scalar(sa.select(sa.func.min(schema.groups.c.version)).where(kept))
            return oldest

    def payload(self, index: int) -> bytes:
        """The bytes of a finished group. Raises DamagedGroupError if there are none, or none that can be read."""
        try:
            with schema.errors(), self._engine.connect() as connection:
                data = schema.read_payload(connection, index)
        except DamagedJournalError as error:
            raise DamagedGroupError(f"group {index}: its stored bytes cannot be read: {error}") from error
        if data is None:
            raise DamagedGroupError(f"group {index}: the journal holds no bytes for it")
        return data

    def payloads(self, indices: Sequence[int]) -> dict[int, bytes]:
        """The bytes of those of the finished groups that have any. Raises DamagedJournalError if one cannot be read."""
        query = sa.select(schema.groups.c.index, schema.groups.c.payload).where(schema.groups.c.index.in_(indices))
        with schema.errors(), self._engine.connect() as connection:
            return {index: bytes(data) for index, data in connection.execute(query) if data is not None}

    def kept(self) -> list[int]:
        """The indices of all finished groups that still have their bytes, in order."""
        held = schema.groups.c.payload.is_not(None) & (schema.groups.c.state == "finished")
        query = sa.select(schema.groups.c.index).where(held).order_by(schema.groups.c.index)
        with schema.errors(), self._engine.connect() as connection:
            return list(connection.scalars(query))

    def groups(self) -> list[GroupRow]:
        """Every group, by index."""
        with schema.errors(), self._engine.connect() as connection:
            rows = connection.execute(sa.select(*_GROUP_COLUMNS).order_by(schema.groups.c.index)).all()
        return [GroupRow(**dict(zip(_GROUP_FIELDS, row, strict=True))) for row in rows]

    def consumption(self) -> list[Consumption]:
        """The consumption of the surviving lineage, in the order it happened."""
        columns = [schema.consumption.c[name] for name in Consumption.__dataclass_fields__]
        query = sa.select(*columns).where(schema.consumption.c.voided_by.is_(None)).order_by(schema.consumption.c.id)
        with schema.errors(), self._engine.connect() as connection:
            rows = connection.execute(query).all()
        names = tuple(Consumption.__dataclass_fields__)
        return [Consumption(**dict(zip(names, row, strict=True))) for row in rows]

    def untrained_tokens(self) -> dict[str, int]:
        """Tokens counted outside finished groups, by reason, over all attempts."""
        query = sa.select(schema.untrained_tokens.c.reason, sa.func.sum(schema.untrained_tokens.c.tokens)).group_by(
            schema.untrained_tokens.c.reason
        )
        with schema.errors(), self._engine.connect() as connection:
            return {reason: int(tokens) for reason, tokens in connection.execute(query)}

    @contextmanager
    def _write(self) -> Iterator[Connection]:
        """One transaction, behind the fence."""
        with schema.errors(), self._writer.begin() as connection:
            newest = connection.scalar(sa.select(schema.fence.c.attempt).with_for_update())
            if newest != self.attempt:
                raise PoolError(
                    f"run attempt {self.attempt} may not write to the journal: attempt {newest} has taken over; "
                    "stop this trainer"
                )
            yield connection

    def _end(
        self,
        dispatch: Dispatch,
        values: dict[str, Any],
        *,
        kept: int,
        counted: Mapping[str, int],
        payload: bytes | None = None,
    ) -> Acceptance:
        """``kept`` tokens are in the payload, the others ``counted`` by reason."""
        with self._write() as connection:
            row = _row(connection, dispatch.index)
            if row is None or dispatch.attempt > row.attempt:
                raise PoolError(
                    f"group {dispatch.index} attempt {dispatch.attempt} was never dispatched from this journal"
                )
            if dispatch.attempt < row.attempt:
                owned = schema.untrained_tokens.c.owner == dispatch.owner
                if connection.scalar(sa.select(schema.untrained_tokens.c.id).where(owned)) is not None:
                    return "repeated"
                _count(connection, self.attempt, dispatch.owner, {LOST_ATTEMPT: kept + sum(counted.values())})
                return "lost"
            if row.state == values["state"]:
                return "repeated"
            if row.state != "dispatched":
                raise PoolError(f"group {dispatch.index} is reported as {values['state']}, but it is {row.state}")
            connection.execute(sa.update(schema.groups).where(schema.groups.c.index == dispatch.index).values(**values))
            if payload is not None:
                schema.write_payload(connection, dispatch.index, payload)
            _count(connection, self.attempt, dispatch.owner, counted)
            return "accepted"

    def _check_step(self, connection: Connection, step: int) -> None:
        forgotten = connection.scalar(sa.select(schema.fence.c.forgotten_before)) or 0
        if step < forgotten:
            raise PoolError(
                f"cannot go back to step {step}: the journal has forgotten the groups consumed before "
                f"step {forgotten}; resume from a checkpoint at step {forgotten} or later"
            )
        last = connection.scalar(
            sa.select(sa.func.max(schema.consumption.c.step)).where(schema.consumption.c.voided_by.is_(None))
        )
        known = 0 if last is None else last + 1
        if step > known:
            raise PoolError(
                f"cannot go on from step {step}: the journal knows {known} steps, so the checkpoint is that of "
                "another run; put back its journal, or start a new run directory"
            )


_GROUP_FIELDS = tuple(GroupRow.__dataclass_fields__)
_GROUP_COLUMNS = [schema.groups.c[name] for name in _GROUP_FIELDS]


def _row(connection: Connection, index: int) -> GroupRow | None:
    found = (
        connection.execute(sa.select(*_GROUP_COLUMNS).where(schema.groups.c.index == index)).mappings().one_or_none()
    )
    return None if found is None else GroupRow(**found)


def _void(connection: Connection, step: int, attempt: int) -> None:
    beyond = schema.consumption.c.voided_by.is_(None) & (schema.consumption.c.step >= step)
    connection.execute(sa.update(schema.consumption).where(beyond).values(voided_by=attempt))


def _count(connection: Connection, run_attempt: int, owner: str, counted: Mapping[str, int]) -> None:
    for reason, tokens in counted.items():
        values = {"run_attempt": run_attempt, "owner": owner, "reason": reason, "tokens": tokens}
        connection.execute(sa.insert(schema.untrained_tokens).values(**values))


def _claim(connection: Connection) -> int:
    row = connection.execute(sa.select(schema.fence).with_for_update()).mappings().one_or_none()
    if row is None:
        connection.execute(sa.insert(schema.fence).values(id=1, schema=schema.VERSION, attempt=0, forgotten_before=0))
        return 0
    if row["schema"] != schema.VERSION:
        raise PoolError(f"the journal has schema {row['schema']}, expected {schema.VERSION}; start a new run directory")
    connection.execute(sa.update(schema.fence).values(attempt=row["attempt"] + 1))
    return int(row["attempt"]) + 1
