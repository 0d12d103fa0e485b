"""Where the training loop gets its packed steps from."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import grain

from forgejax.learner import CreditConfig, PackConfig, PackGroups, TrainingBatch, make_judge
from forgejax.pool.dataset import GroupBatch, GroupDataset
from forgejax.pool.pool import Pool
from forgejax.report.figures import measure_groups


@dataclass(frozen=True, kw_only=True)
class StepData:
    """One step's packed batch, the figures of the groups it came from, and when (``time.monotonic()``) packing them
    began and ended."""

    number: int
    training: TrainingBatch
    figures: Mapping[str, float]
    packing_began: float
    packing_ended: float


class StepSource(Protocol):
    """What the loop asks for the next packed step, and the checkpoints for the place in the data."""

    def next(self) -> StepData | None:
        """Waits for the data of the next step; None once no more will come. Raises ForgejaxError."""
        ...

    def get_state(self) -> dict[str, Any]:
        """The place behind the last step that ``next`` gave, as plain data."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a place that ``get_state`` told. Raises ForgejaxError for another."""
        ...


class PooledSteps:
    """The groups of a pool, judged and packed: one step ahead of the learner, in Grain's thread, or in ``lockstep``
    with it, when it asks and once no group is running.

    Ends when the pool is closed. Close the pool before this: the thread may be waiting for a group.
    """

    def __init__(
        self, pool: Pool, *, credit: CreditConfig, packing: PackConfig, row_shards: int, lockstep: bool = False
    ) -> None:
        self._pack_groups = PackGroups(credit=credit, packing=packing, row_shards=row_shards)
        prepared = GroupDataset(pool, make_judge(credit, packing), lockstep=lockstep).map(self._prepare)
        ahead = grain.experimental.ThreadPrefetchIterDataset(prepared, prefetch_buffer_size=1)
        self._steps: grain.DatasetIterator[StepData] = iter(prepared if lockstep else ahead)

    def next(self) -> StepData | None:
        """See ``StepSource``. Raises TrainingError where no group comes in time, or none that can be trained."""
        return next(self._steps, None)

    def get_state(self) -> dict[str, Any]:
        state: dict[str, Any] = self._steps.get_state()
        return state

    def set_state(self, state: dict[str, Any]) -> None:
        """Rewinds the pool as well; where steps are made ahead, begins to fill the one of that place."""
        self._steps.set_state(state)
        self._steps.start_prefetch()

    def close(self) -> None:
        self._steps.close()

    def _prepare(self, batch: GroupBatch) -> StepData:
        began = time.monotonic()
        training = self._pack_groups(batch.groups)
        return StepData(
            number=batch.number,
            training=training,
            figures=measure_groups(batch.groups, step=batch.number),
            packing_began=began,
            packing_ended=time.monotonic(),
        )
