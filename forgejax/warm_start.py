"""The supervised phase before RL: the policy imitates demonstrations, through the same tree step as everything else.

Its result depends on the configuration only, so it is cached and the next run starts at once.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grain
import numpy as np

from forgejax.agents.demonstrations import AgentDescription, calculator_demonstrations, describe_agent
from forgejax.errors import ConfigError
from forgejax.gateway import ChatFormat
from forgejax.learner import (
    Learner,
    LossConfig,
    OptimizerConfig,
    PackConfig,
    PackedStep,
    Sample,
    StepConfig,
    pack,
    supervised_sample,
)
from forgejax.types import TaskSource

_TASKS_FROM = 1_000_000_000
"""Demonstrations use task indices from here on, so that they are other draws than those of the RL phase."""


@dataclass(frozen=True, kw_only=True)
class WarmStartConfig:
    """How long to imitate, and what.

    ``steps`` of 0 leaves the phase out. Each of the ``demonstrations``, ``batch_size`` of which make a step, solves one
    training task, with the tool in ``tool_rate`` of them whatever the level: when to use it is left for RL to find out.
    The demonstrator is no calculator: at ``guessed_levels`` it cannot work an answer out in its head and guesses where
    it does without the tool. ``describe`` is the command by which the agent program prints its system prompt and tools.
    ``cache`` is a folder, or empty for none.
    """

    steps: int = 0
    demonstrations: int = 8192
    batch_size: int = 128
    tool_rate: float = 0.5
    guessed_levels: tuple[str, ...] = ()
    describe: tuple[str, ...] = ()
    cache: str = ".cache/warm_start"
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        if self.steps < 0 or not 1 <= self.batch_size <= self.demonstrations:
            raise ConfigError(
                f"warm_start.steps {self.steps}, batch_size {self.batch_size} and demonstrations "
                f"{self.demonstrations}: expected 0 or more steps of 1 up to all demonstrations"
            )
        if not 0.0 <= self.tool_rate <= 1.0:
            raise ConfigError(f"warm_start.tool_rate is {self.tool_rate}; expected a share from 0 to 1")
        if self.steps and not self.describe:
            raise ConfigError("warm_start.describe is empty; give the command that prints the agent's prompt and tools")

    def step_config(self, base: StepConfig) -> StepConfig:
        """The supervised step: the loss and the optimizer are its own, memory settings those of the run."""
        return dataclasses.replace(base, loss=LossConfig(name="sft"), optimizer=self.optimizer)


@dataclass(frozen=True, kw_only=True)
class Demonstrations:
    """A seeded set of demonstrations, as token ids."""

    config: WarmStartConfig
    tasks: TaskSource
    chat: ChatFormat
    agent: AgentDescription
    seed: int

    def samples(self, index: int) -> list[Sample]:
        """The completions of demonstration ``index``, each in its context: one for each turn of the assistant."""
        task = self.tasks.task(_TASKS_FROM + index)
        use_tool = bool(np.random.default_rng([self.seed, index]).random() < self.config.tool_rate)
        guessed = not use_tool and task.level in self.config.guessed_levels
        answer = _guess(task.question) if guessed else str(task.payload["answer"])
        messages = calculator_demonstrations(task, answer, use_tool=use_tool, agent=self.agent)
        samples = []
        for position, message in enumerate(messages):
            if message["role"] == "assistant":
                context = self.chat.render(messages[:position], self.agent.tools)
                spoken = self.chat.encode_assistant(message, messages[:position])
                samples.append(
                    supervised_sample(
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


def _guess(question: str) -> str:
    """What comes to mind without calculating: the first number of the question."""
    found = re.search(r"\d+", question)
    return found[0] if found else "0"


def make_demonstrations(config: WarmStartConfig, tasks: TaskSource, chat: ChatFormat, seed: int) -> Demonstrations:
    """Raises AgentError if the agent program does not describe itself."""
    return Demonstrations(config=config, tasks=tasks, chat=chat, agent=describe_agent(config.describe), seed=seed)


def cache_key(settings: Any, demonstrations: Demonstrations, tokenizer: str) -> str:
    """A digest of all that the phase's result depends on: configuration, tokenizer and the agent's own words."""
    parts = [
        json.dumps(settings, sort_keys=True),
        json.dumps(dataclasses.asdict(demonstrations.agent), sort_keys=True),
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
        progress(number, float(learner.update(packed.batches, version=0, trunks=packed.trunks)["loss"]))
