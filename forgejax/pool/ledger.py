"""What became of every group and every token the pool was told of, in the lineage of the current parameters."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from forgejax.pool.journal import Consumption, GroupRow

UNUSED_AT_END = "unused_at_end"
IN_FLIGHT_AT_END = "in_flight_at_end"


@dataclass(frozen=True, kw_only=True)
class TokenAccount:
    """Sampled tokens by fate; ``trained + waiting + sum(not_trained.values())`` is every token the pool knows of.

    ``trained`` is what the verdicts left to be trained in retired batches, ``waiting`` the tokens of finished groups
    that no retired batch holds. After the pool is closed these stand under ``not_trained["unused_at_end"]`` instead.
    """

    trained: int
    waiting: int
    not_trained: Mapping[str, int]

    @property
    def total(self) -> int:
        return self.trained + self.waiting + sum(self.not_trained.values())


@dataclass(frozen=True, kw_only=True)
class PoolSnapshot:
    """The pool at one moment. Counts and maxima are those of the surviving lineage, over all run attempts.

    ``waiting`` groups were running when an attempt ended, and have not been dispatched again.
    """

    version: int
    head: int
    in_flight: int
    waiting: int
    running: int
    finished_waiting: int
    groups_dispatched: int
    groups_trained: int
    groups_dropped: Mapping[str, int]
    groups_failed: Mapping[str, int]
    disorder_max: int
    lag_max: int
    staleness_max: int

    @property
    def groups_not_trained(self) -> dict[str, int]:
        """Dropped and failed groups, by reason."""
        reasons = sorted({*self.groups_dropped, *self.groups_failed})
        return {reason: self.groups_dropped.get(reason, 0) + self.groups_failed.get(reason, 0) for reason in reasons}


class Ledger:
    """The running sums. Built from the journal, then told of each event; both ways give the same figures."""

    def __init__(
        self,
        groups: Iterable[GroupRow] = (),
        consumption: Iterable[Consumption] = (),
        untrained_tokens: Mapping[str, int] | None = None,
        *,
        retired_before: int = 0,
    ) -> None:
        """``retired_before``: batches below this number are trained."""
        self.dispatched = 0
        self.failed: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self.trained = 0
        self.disorder_max = self.lag_max = self.staleness_max = 0
        self._versions: dict[int, int] = {}
        self._waiting: dict[int, int] = {}
        self._open: dict[int, list[Consumption]] = {}
        self._tokens_trained = 0
        self._tokens_not_trained: Counter[str] = Counter(untrained_tokens or {})
        for group in groups:
            self.dispatch(group.index, group.version)
            if group.state == "finished":
                self.finish(group.index, group.sampled_tokens)
            elif group.state == "failed":
                self.fail(group.index, group.reason or "unknown")
        for record in consumption:
            self.consume(record)
        for step in sorted(self._open):
            if step < retired_before:
                self.retire(step)

    def dispatch(self, index: int, version: int) -> None:
        """A new group, or a further attempt of one."""
        self.dispatched = max(self.dispatched, index + 1)
        self._versions[index] = version

    def finish(self, index: int, sampled_tokens: int) -> None:
        self._waiting[index] = sampled_tokens

    def fail(self, index: int, reason: str) -> None:
        """The group alone; its tokens are told to ``count_tokens``."""
        self.failed[reason] += 1
        self._versions.pop(index, None)

    def count_tokens(self, reason: str, tokens: int) -> None:
        self._tokens_not_trained[reason] += tokens

    def consume(self, record: Consumption) -> None:
        self.disorder_max = max(self.disorder_max, record.disorder)
        self.lag_max = max(self.lag_max, record.lag)
        version = self._versions.pop(record.index)
        if record.kind == "taken":
            # Version n is the parameters after n steps, so step n starts on version n.
            self.staleness_max = max(self.staleness_max, record.step - version)
            self._open.setdefault(record.step, []).append(record)
            return
        del self._waiting[record.index]
        self.dropped[record.reason or "unknown"] += 1
        self._tokens_not_trained.update(record.untrained)

    def count_batch(self, step: int) -> int:
        """Groups that batch ``step`` has so far."""
        return len(self._open.get(step, ()))

    def retire(self, step: int) -> list[int]:
        """Books batch ``step`` as trained; gives the indices of its groups."""
        records = self._open.pop(step, [])
        for record in records:
            self.trained += 1
            self._tokens_not_trained.update(record.untrained)
            self._tokens_trained += self._waiting.pop(record.index) - sum(record.untrained.values())
        return [record.index for record in records]

    def sampled_tokens(self, index: int) -> int:
        """Of a finished group that is neither dropped nor retired."""
        return self._waiting[index]

    def tokens(self, *, ended: bool = False) -> TokenAccount:
        """The account now; ``ended`` books what still waits as unused_at_end."""
        waiting = sum(self._waiting.values())
        not_trained = Counter(self._tokens_not_trained)
        if ended:
            not_trained[UNUSED_AT_END] += waiting
        return TokenAccount(
            trained=self._tokens_trained,
            waiting=0 if ended else waiting,
            not_trained={reason: tokens for reason, tokens in sorted(not_trained.items()) if tokens},
        )
