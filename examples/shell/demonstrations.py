"""The supervised phase of the shell run: what the shell agent and a model that can use a shell would say."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from forgejax.errors import ConfigError
from forgejax.run.warm_start import Demonstration
from forgejax.types import Task

sys.path.insert(0, str(Path(__file__).resolve().parent))
from make_tasks import KINDS, ShellTask, draw_task
from shell_agent import DONE, show

_DRAWS = 1_000_000  # seeds of the demonstrations' own tasks
_QUIET = show(0, "")  # what a solution prints: nothing


class ShellDemonstrator:
    """Does a task with one command and says that it is done.

    In all but ``right_rate`` of the demonstrations the command is that of another task of the same kind: how each kind
    is done is shown, and that names and numbers matter is left for RL to find out. Raises ConfigError for a rate that
    is no share.
    """

    def __init__(self, *, right_rate: float) -> None:
        if not 0.0 <= right_rate <= 1.0:
            raise ConfigError(f"warm_start.options.right_rate is {right_rate}; expected a share from 0 to 1")
        self._right_rate = right_rate

    @property
    def identity(self) -> str:
        files = sorted(Path(__file__).parent.glob("*.py"))
        return "\n".join(file.read_text(encoding="utf-8") for file in files)

    def demonstrate(self, task: Task, rng: np.random.Generator) -> Demonstration:
        index = int(rng.integers(len(KINDS)))
        shown, done = draw(index, rng), draw(index, rng)
        if rng.random() < self._right_rate:
            done = shown
        return Demonstration(messages=write_messages(shown.instruction, done.solution))


def draw(index: int, rng: np.random.Generator) -> ShellTask:
    """A task of a kind, of those that no run's seed draws."""
    return draw_task(index, -1 - int(rng.integers(_DRAWS)))


def write_messages(instruction: str, command: str) -> list[dict[str, Any]]:
    said = (instruction, command, _QUIET, DONE)
    return [{"role": ("user", "assistant")[turn % 2], "content": text} for turn, text in enumerate(said)]
