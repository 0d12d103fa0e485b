"""The pool as a Grain dataset: numbered batches of judged groups, in window order, with a state that can be saved."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import grain

from forgejax.errors import PoolError, TrainingError
from forgejax.pool.pool import Pool
from forgejax.types import EpisodeEnds, Group, Judge


@dataclass(frozen=True, kw_only=True)
class GroupBatch:
    """The groups that step ``number`` trains on, oldest index first as they were taken; at least one."""

    number: int
    groups: tuple[Group, ...]


class GroupDataset(grain.IterDataset[GroupBatch]):
    """Iterates over the batches of a pool; put ``map`` and a prefetching dataset behind it. One iterator at a time.

    Iteration ends when the pool is closed. Close the pool before the iterator: a prefetching thread may be waiting for
    a group, and only the pool can wake it. ``lockstep``: a batch is given once no group is running any more, so that
    none sees the weights change.
    """

    def __init__(self, pool: Pool, judge: Judge, *, lockstep: bool = False) -> None:
        super().__init__()
        self._pool = pool
        self._judge = judge
        self._lockstep = lockstep

    def __iter__(self) -> "GroupIterator":
        return GroupIterator(self._pool, self._judge, lockstep=self._lockstep)


class GroupIterator(grain.DatasetIterator[GroupBatch]):
    """State ``{"batch": n}``: n is the number of the next batch. Setting it rewinds the pool to step n."""

    def __init__(self, pool: Pool, judge: Judge, *, lockstep: bool = False) -> None:
        super().__init__()
        self._pool = pool
        self._judge = judge
        self._lockstep = lockstep
        self._number = pool.next_step
        self._filling: list[Group] = []

    def __next__(self) -> GroupBatch:
        """The next batch: groups_per_step groups, or fewer after max_drops_in_a_row drops.

        Raises TrainingError when no group can be taken within take_timeout_s (calling again goes on with the batch
        begun), or when that many drops in a row leave no group at all. A group the judge drops is replaced at once.
        """
        config = self._pool.config
        drops: Counter[str] = Counter()
        endings = EpisodeEnds(reasons={})
        while len(self._filling) < config.window.groups_per_step and drops.total() < config.max_drops_in_a_row:
            group = self._pool.take(config.take_timeout_s)
            if group is None:
                raise StopIteration
            reason = self._judge_group(group)
            if reason is None:
                drops, endings = Counter(), EpisodeEnds(reasons={})
            else:
                drops[reason] += 1
                endings += EpisodeEnds.of(group.trajectories)
        if not self._filling:
            counts = ", ".join(f"{reason} {count}" for reason, count in drops.most_common())
            raise TrainingError(
                f"batch {self._number}: {drops.total()} groups in a row were dropped ({counts}), so there is nothing "
                f"to train on; {endings.explain()}"
            )
        if self._lockstep and not self._pool.await_quiet(config.take_timeout_s):
            raise StopIteration
        batch = GroupBatch(number=self._number, groups=tuple(self._filling))
        self._pool.seal(self._number)
        self._filling = []
        self._number += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        return {"batch": self._number}

    def set_state(self, state: dict[str, Any]) -> None:
        number = state.get("batch")
        if not isinstance(number, int) or number < 0:
            raise PoolError(f"the data state of the checkpoint is {state}; expected {{'batch': n}} with n >= 0")
        self._pool.rewind(number)
        self._number = number
        self._filling = []

    def __str__(self) -> str:
        return "GroupIterator"

    def _judge_group(self, group: Group) -> str | None:
        """Puts the group into the batch, or drops it and gives the reason."""
        verdict = self._judge(group)
        index = group.dispatch.index
        if verdict.drop is not None:
            self._pool.drop(index, step=self._number, reason=verdict.drop, untrained=verdict.untrained)
            return verdict.drop
        self._pool.accept(index, step=self._number, untrained=verdict.untrained)
        self._filling.append(group)
        return None
