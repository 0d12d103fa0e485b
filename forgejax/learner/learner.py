"""The learner: train state on its devices, and the loop of micro-batches that makes one update."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from forgejax.learner.digest import digest_arrays
from forgejax.learner.packing.batch import PackedBatch, PackedStep, PackedTrunk
from forgejax.learner.packing.deal import batch_axes, deal_rows
from forgejax.learner.step.train_step import Accumulated, Metrics, StepConfig, TrainState, TrainStep, make_train_step
from forgejax.learner.step.trunk_step import TrunkStep, make_trunk_step
from forgejax.sharding import ONE_DEVICE, Layout


class Learner:
    """Owns the train state. One thread calls it: it dispatches programs with collectives.

    Attributes:
        state: weights in FP32, optimizer state and update count; its arrays die with the next ``update``. Assign a
            restored state of the same shapes and shardings to resume.
        weights: those of ``state`` in the policy's dtype: what runs, and what is published. They may die with the next
            ``update`` as well.
        row_shards: how many shards split the rows of a batch, for ``pack``.
        batch_shapes: those of the micro-batches so far; each new one compiles a program for every function it goes to.
    """

    def __init__(self, graphdef: Any, params: Any, config: StepConfig, *, layout: Layout = ONE_DEVICE):
        """``params`` are copied; they already lie as the layout wants them."""
        self._layout = layout
        self._step: TrainStep = make_train_step(graphdef, params, config, layout=layout)
        self._make_trunk_step: Callable[[Any], TrunkStep] = functools.partial(
            make_trunk_step, graphdef, config=config, start=self._step.start, layout=layout
        )
        self._copy = layout.in_turn(jax.jit(lambda tree: jax.tree.map(jnp.copy, tree)))
        self.row_shards = layout.shards("rows")
        self.state = self._step.init(params)
        self.batch_shapes: set[tuple[tuple[int, ...], ...]] = set()

    @property
    def state(self) -> TrainState:
        return self._state

    @state.setter
    def state(self, state: TrainState) -> None:
        self._state, self.weights = state, self._step.cast(state.params)

    def update(self, step: PackedStep, version: int) -> Metrics:
        """One optimizer step over all its micro-batches; returns without waiting for the devices.

        Args:
            step: packed for ``row_shards``.
            version: the policy version of the weights being trained.

        Returns:
            Scalars on the device; read them one step late.

        Raises:
            ValueError: there is nothing to train on.
            ConfigError: there are trunks, and the mesh splits the length of rows.
        """
        self.state, metrics = self._step.apply(self.state, self.gradient(step, version))
        return metrics

    def gradient(self, step: PackedStep, version: int) -> Accumulated:
        """What an update applies: gradients and figures summed over the micro-batches; the state stays as it is."""
        if not step.batches and not step.trunks:
            raise ValueError("a step of no micro-batches; expected at least one")
        accumulated = self._step.start(self.weights)
        for batch in step.batches:
            accumulated = self._step.accumulate(self.weights, accumulated, self.place(batch), np.int32(version))
        for trunk in step.trunks:
            accumulated = self._through_trunk(accumulated, trunk, np.int32(version))
        return accumulated

    def score(self, step: PackedStep) -> list[jax.Array]:
        """log-probabilities [B, M] of the terms of every micro-batch, in the order of ``PackedStep.parts``, under the
        current weights; nothing is updated."""
        params = self.weights
        scored = [self._step.score(params, self.place(batch)) for batch in step.batches]
        for each in step.trunks:
            trunk = self.place(each.trunk)
            kv, _ = self._trunk_step.trunk(params, trunk)
            scored.append(self._step.score(params, trunk))
            scored += [self._trunk_step.score_leaves(params, kv, self.place(leaf)) for leaf in each.leaves]
        return scored

    def params(self) -> Any:
        """A copy of the current weights, in the policy's dtype, on the same devices: it outlives the next update."""
        return self._copy(self.weights)

    def digest(self) -> str:
        """A checksum of the weights of ``state``, whatever devices they lie on."""
        with self._layout.turn():
            return digest_arrays(self.state.params)

    def compile(self, step: PackedStep) -> None:
        """Compiles the gradients of micro-batches of these shapes and leaves the state as it is.

        What applies them is short, and compiles when the first update calls it.
        """
        jax.block_until_ready(self.gradient(step, 0))

    @functools.cached_property
    def _trunk_step(self) -> TrunkStep:
        """Made when the first trunk comes: not every mesh can have trunks."""
        return self._make_trunk_step(self.weights)

    def _through_trunk(self, accumulated: Accumulated, packed: PackedTrunk, version: np.int32) -> Accumulated:
        step, params, trunk = self._trunk_step, self.weights, self.place(packed.trunk)
        kv, d_kv = step.trunk(params, trunk)
        for leaf in packed.leaves:
            accumulated, d_kv = step.accumulate_leaves(params, kv, (accumulated, d_kv), self.place(leaf), version)
        return step.pull_back(params, accumulated, d_kv, trunk, version)

    def place(self, batch: PackedBatch) -> PackedBatch:
        """Puts a batch on the devices, rows split over the mesh, and the tokens of rows where it splits them as well.

        Every process holds the whole batch.

        Raises:
            ValueError: the blocks of a row cannot be dealt evenly to the devices that share it.
        """
        if (shards := self._layout.shards("length")) > 1:
            batch = deal_rows(batch, shards)
        self.batch_shapes.add(tuple(x.shape for x in jax.tree.leaves(batch)))
        return self._layout.put(batch, batch_axes(batch))
