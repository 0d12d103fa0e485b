"""The learner: train state on a mesh, and the loop of micro-batches that makes one update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from forgejax.learner.batch import PackedBatch
from forgejax.learner.step import Metrics, StepConfig, TrainState, TrainStep, make_train_step
from forgejax.sharding import Rules, batch_sharding, rows_shards


class Learner:
    """Owns the train state. One thread calls it: it dispatches programs with collectives.

    Attributes:
        state: weights, optimizer state and update count; its arrays die with the next ``update``. Assign a restored
            state of the same shapes and shardings to resume.
        row_shards: how many shards split the rows of a batch, for ``pack``.
    """

    def __init__(
        self,
        graphdef: Any,
        params: Any,
        config: StepConfig,
        *,
        mesh: Mesh | None = None,
        rules: Rules | None = None,
    ):
        """``params`` are copied; on a mesh they already lie on it."""
        rules = rules or Rules()
        self._sharding = batch_sharding(mesh, rules) if mesh is not None else None
        self._step: TrainStep = make_train_step(graphdef, params, config, mesh=mesh, rules=rules)
        self._copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
        self.row_shards = rows_shards(mesh, rules) if mesh is not None else 1
        self.state: TrainState = self._step.init(params)

    def update(self, batches: Sequence[PackedBatch], version: int) -> Metrics:
        """One optimizer step over all micro-batches; returns without waiting for the devices.

        Args:
            batches: of one ``PackedStep``; at least one.
            version: the policy version of the weights being trained.

        Returns:
            Scalars on the device; read them one step late.
        """
        if not batches:
            raise ValueError("an update of no batches; expected at least one")
        accumulated = self._step.start(self.state.params)
        for batch in batches:
            accumulated = self._step.accumulate(self.state.params, accumulated, self.place(batch), np.int32(version))
        self.state, metrics = self._step.apply(self.state, accumulated)
        return metrics

    def score(self, batch: PackedBatch) -> jax.Array:
        """log-probabilities [B, M] of the batch's terms under the current weights; nothing is updated."""
        return self._step.score(self.state.params, self.place(batch))

    def params(self) -> Any:
        """A copy of the current weights, on the same devices, to publish: it outlives the next update."""
        return self._copy(self.state.params)

    def compile(self, batch: PackedBatch) -> None:
        """Compiles the gradients of a batch of these shapes and leaves the state as it is.

        What applies them is short, and compiles when the first update calls it.
        """
        accumulated = self._step.start(self.state.params)
        jax.block_until_ready(self._step.accumulate(self.state.params, accumulated, self.place(batch), np.int32(0)))

    def place(self, batch: PackedBatch) -> PackedBatch:
        """Puts a batch on the devices, rows split over the mesh. Every process holds the whole batch."""
        sharding = self._sharding
        if sharding is None:
            return jax.device_put(batch)

        def one(x: np.ndarray) -> jax.Array:
            return jax.make_array_from_callback(x.shape, sharding, x.__getitem__)

        return jax.tree.map(one, batch)
