"""The supervised phase before RL: the policy imitates demonstrations, through the same tree step as everything else.

Its result depends on the configuration only, so it is cached and the next run starts at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import grain
import numpy as np

from forgejax.chat import ChatFormat
from forgejax.chat.messages import TemplateMessage, Tool
from forgejax.environments import Environment
from forgejax.errors import CheckpointError, ConfigError, ForgejaxError
from forgejax.imports import load_object
from forgejax.learner import (
    Learner,
    LossConfig,
    OptimizerConfig,
    PackConfig,
    PackedStep,
    Sample,
    StepConfig,
    make_supervised_sample,
    pack,
)
from forgejax.models import Params, PolicyConfig, init_params, load_params
from forgejax.report.live.progress import Progress
from forgejax.run.checkpoint import load_tree, save_tree
from forgejax.run.pod.orders import NOBODY_ELSE, Orders
from forgejax.sharding import Layout
from forgejax.types import Task

_TASKS_FROM = 1_000_000_000
"""Demonstrations use task indices from here on, so that they are other draws than those of the RL phase."""

_ABANDONED_S = 3600.0
"""What is written into the cache is whole or forgotten after so long."""


@dataclass(frozen=True, kw_only=True)
class WarmStartConfig:
    """How long to imitate, and whom.

    ``steps`` of 0 leaves the phase out. Each of the ``demonstrations``, ``batch_size`` of which make a step, solves one
    training task. ``demonstrator`` names what makes them, ``module:name`` or ``file.py:name``: called with ``options``
    it gives a ``Demonstrator``. ``cache`` is a folder, or empty for none.
    """

    steps: int = 0
    demonstrations: int = 8192
    batch_size: int = 128
    demonstrator: str = ""
    options: dict[str, int | float | str | bool | list[str]] = field(default_factory=dict)
    cache: str = ".cache/warm_start"
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        if self.steps < 0 or not 1 <= self.batch_size <= self.demonstrations:
            raise ConfigError(
                f"warm_start.steps {self.steps}, batch_size {self.batch_size} and demonstrations "
                f"{self.demonstrations}: expected 0 or more steps of 1 up to all demonstrations"
            )
        if self.steps and not self.demonstrator:
            raise ConfigError(
                'warm_start.demonstrator is empty; name what makes the demonstrations, as "path/to/file.py:name"'
            )

    def step_config(self, base: StepConfig) -> StepConfig:
        """The supervised step: the loss and the optimizer are its own, memory settings those of the run."""
        optimizer = self.optimizer.ending_at(self.steps)
        return dataclasses.replace(base, loss=LossConfig(name="sft"), optimizer=optimizer)


@dataclass(frozen=True, kw_only=True)
class Demonstration:
    """A whole conversation, and the tools it was held with. What the assistant says in it is to be imitated."""

    messages: Sequence[TemplateMessage]
    tools: Sequence[Tool] = ()


class Demonstrator(Protocol):
    """Solves tasks for the policy to imitate."""

    @property
    def identity(self) -> str:
        """What its demonstrations depend on beside its options: demonstrators that differ have different ones."""
        ...

    def demonstrate(self, task: Task, rng: np.random.Generator) -> Demonstration:
        """Depends on the arguments only; ``rng`` is seeded for this task."""
        ...


@dataclass(frozen=True, kw_only=True)
class Demonstrations:
    """A seeded set of demonstrations, as token ids."""

    config: WarmStartConfig
    environment: Environment
    chat: ChatFormat
    demonstrator: Demonstrator
    seed: int

    def samples(self, index: int) -> list[Sample]:
        """The completions of demonstration ``index``, each in its context: one for each turn of the assistant."""
        task = self.environment.task(_TASKS_FROM + index)
        shown = self.demonstrator.demonstrate(task, np.random.default_rng([self.seed, index]))
        samples = []
        for position, message in enumerate(shown.messages):
            if message["role"] == "assistant":
                history = shown.messages[:position]
                context = self.chat.render(history, shown.tools)
                spoken = self.chat.encode_assistant(message, history)
                samples.append(
                    make_supervised_sample(
                        f"demonstration-{index}-{position}", np.asarray(context, np.int32), np.asarray(spoken, np.int32)
                    )
                )
        return samples

    def batches(self, packing: PackConfig, row_shards: int) -> Iterator[PackedStep]:
        """One packed step for each step of the phase, prepared in a thread of Grain's."""
        # All demonstrations begin alike, so they are merged into one forest, and every token weighs the same.
        packing = dataclasses.replace(packing, loss_norm="batch")
        samples = functools.lru_cache(maxsize=None)(self.samples)  # rendering one costs as much as training on it

        def packed(members: Sequence[int]) -> PackedStep:
            together = [sample for index in members for sample in samples(int(index))]
            return pack([together], packing, row_shards=row_shards)

        epochs = grain.MapDataset.range(self.config.demonstrations).shuffle(seed=self.seed).repeat()
        batches = epochs.to_iter_dataset(grain.ReadOptions(num_threads=0)).batch(self.config.batch_size, batch_fn=list)
        ahead = grain.experimental.ThreadPrefetchIterDataset(batches.map(packed), prefetch_buffer_size=4)
        iterator = iter(ahead)
        try:
            for _ in range(self.config.steps):
                yield next(iterator)
        finally:
            iterator.close()


def find_first_weights(config: PolicyConfig, layout: Layout, *, seed: int, fresh: bool) -> Params:
    """The weights that a run has before any warm start: those in ``policy.path``, or random ones.

    A run that is not ``fresh`` only needs arrays to restore into. Raises ForgejaxError for what cannot be loaded.
    """
    return load_params(config, layout) if fresh and config.path else init_params(config, layout, seed)


def make_demonstrations(
    config: WarmStartConfig, environment: Environment, chat: ChatFormat, seed: int
) -> Demonstrations:
    """Raises ConfigError for a demonstrator that is not there or does not take these options, and what it raises."""
    make = load_object(config.demonstrator, "warm_start.demonstrator")
    try:
        demonstrator: Demonstrator = make(**config.options)
    except TypeError as error:
        raise ConfigError(
            f"warm_start.demonstrator {config.demonstrator} does not take warm_start.options {config.options}: {error}"
        ) from error
    return Demonstrations(config=config, environment=environment, chat=chat, demonstrator=demonstrator, seed=seed)


def make_cache_key(settings: Any, demonstrations: Demonstrations, tokenizer: str) -> str:
    """A digest of all that the phase's result depends on: configuration, tokenizer and demonstrator."""
    parts = [
        json.dumps(settings, sort_keys=True),
        demonstrations.demonstrator.identity,
        *(file.read_text(encoding="utf-8") for file in sorted(Path(tokenizer).glob("tokenizer*.json"))),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def imitate(
    learner: Learner,
    demonstrations: Demonstrations,
    packing: PackConfig,
    progress: Callable[[int, float], None],
) -> None:
    """Runs the phase on a learner made with ``WarmStartConfig.step_config``.

    ``progress(step, loss)`` is called after each step.
    """
    for number, packed in enumerate(demonstrations.batches(packing, learner.row_shards), start=1):
        progress(number, float(learner.update(packed, version=0)["loss"]))


def load_cached(cached: Path, like: Params, note: Callable[[str], None], orders: Orders = NOBODY_ELSE) -> Params | None:
    """The weights kept in ``cached``, laid out as ``like``, or None where there are none; see ``load_tree``.

    What cannot be read is told and removed, to be made anew.
    """
    if not cached.is_dir():
        return None
    try:
        params: Params = load_tree(cached, like, orders)
    except CheckpointError as error:
        note(f"the warm start kept in {cached} is damaged and is made anew: {error}")
        aside = _name_aside(cached)
        with contextlib.suppress(OSError):  # another run was quicker
            cached.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)
        return None
    note(f"warm start taken from {cached}")
    return params


def save_cached(cached: Path, params: Params, note: Callable[[str], None], orders: Orders = NOBODY_ELSE) -> None:
    """Keeps weights in ``cached``, whole or not at all (see ``save_tree``); where they cannot be kept that is told, and
    the run goes on.

    They are written aside and renamed: of several runs that make the same at once the first one's are kept.
    """
    aside = _name_aside(cached)
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        for left in cached.parent.glob(f".{cached.name}.*"):  # by a run that was killed as it wrote
            if time.time() - left.stat().st_mtime > _ABANDONED_S:
                shutil.rmtree(left, ignore_errors=True)
        save_tree(aside, params, orders)
        aside.rename(cached)
    except (ForgejaxError, OSError, ValueError) as error:
        if not cached.is_dir():
            note(f"the warm start could not be kept in {cached}, and the next run makes its own: {error}")
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _name_aside(cached: Path) -> Path:
    """A name beside it that no other run has."""
    return cached.with_name(f".{cached.name}.{uuid.uuid4().hex}")


def describe_weights(path: str) -> list[tuple[str, int, int]]:
    """What tells the weights in ``policy.path`` from others put there later: names, sizes and times of the files."""
    found = sorted(Path(path).iterdir()) if path and Path(path).is_dir() else [Path(path)] if path else []
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in found]


def note_tenths(progress: Progress, steps: int) -> Callable[[int, float], None]:
    """For ``imitate``: notes the loss ten times on the way."""
    every = max(1, steps // 10)

    def note(step: int, loss: float) -> None:
        if step % every == 0 or step == steps:
            progress.note(f"warm start: step {step} of {steps}, loss {loss:.3f}")

    return note
