"""The leader's side of what all processes do together: the followers are told, then it does its own part."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import jax

from forgejax.learner import Learner, Metrics, PackedStep, StepConfig
from forgejax.rollout.fleet.channel import WeightReceiver, serials
from forgejax.run.pod.orders import Orders
from forgejax.sharding import ONE_DEVICE, Layout

Phase = Literal["warm_start", "run"]
"""What a learner is for: its step's configuration depends on it."""


class LeadingLearner(Learner):
    """A ``Learner`` over the devices of all processes: each call is made in every one of them, in one order."""

    def __init__(
        self,
        graphdef: Any,
        params: Any,
        config: StepConfig,
        *,
        orders: Orders,
        phase: Phase,
        layout: Layout = ONE_DEVICE,
    ):
        orders.give("make_learner", phase)
        super().__init__(graphdef, params, config, layout=layout)
        self._orders = orders

    def update(self, step: PackedStep, version: int) -> Metrics:
        self._orders.give("update", step, version)
        return super().update(step, version)

    def score(self, step: PackedStep) -> list[jax.Array]:
        self._orders.give("score", step)
        return super().score(step)

    def params(self) -> Any:
        """See ``Learner``; the followers keep theirs for the learner that is made next."""
        self._orders.give("copy_params")
        return super().params()

    def digest(self) -> str:
        self._orders.give("digest")
        return super().digest()

    def compile(self, step: PackedStep) -> None:
        self._orders.give("compile", step)
        super().compile(step)


@dataclass(frozen=True, kw_only=True)
class HandedOver:
    """``Staged``: a version of the weights that every host's engine already has beside the one that it serves."""

    version: int
    transfer: str
    serial: int = field(default_factory=lambda: next(serials))

    async def stage(self, receiver: WeightReceiver, *, within_s: float) -> str:
        return self.transfer

    def drop(self) -> None:
        """What comes next takes its place."""


def hand_over_everywhere(orders: Orders, take: Callable[[str, Any, int], None]) -> Callable[[Any, int], HandedOver]:
    """For ``ServerEngines``: weights go from the learner's devices to every host's engine, and to this one's by
    ``take`` (transfer, weights, version). No host serves them before all have them."""

    def prepare(params: Any, version: int) -> HandedOver:
        transfer = uuid.uuid4().hex
        orders.give("publish", transfer, version)
        take(transfer, params, version)
        orders.ask("await_publication")
        return HandedOver(version=version, transfer=transfer)

    return prepare
