"""Tasks that are done in a folder: a number is to be written into a file, and the file itself is what counts."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass

from forgejax.environments.base import Score, Workspace
from forgejax.environments.sandbox import SandboxConfig, make_bubblewrap, probe_bubblewrap
from forgejax.environments.scratch import make_scratch, remove_tree
from forgejax.errors import ConfigError
from forgejax.types import Task, Trajectory

_DRAWS = 1000
_MOST_BYTES = 1000  # of a file that can be right


@dataclass(frozen=True, kw_only=True)
class WriteFileConfig:
    """Each task names one of the files ``names`` and a number from ``least`` to ``most``."""

    names: tuple[str, ...] = ("apple", "bread", "cloud", "drum", "eagle", "flute", "grape", "house")
    least: int = 10
    most: int = 99

    def __post_init__(self) -> None:
        if odd := [name for name in self.names if not name.isidentifier()]:
            raise ConfigError(f'tasks write_file.names has "{odd[0]}"; expected words of letters, digits and _')
        if not self.names or not 0 <= self.least < self.most:
            raise ConfigError(
                f"tasks write_file: {len(self.names)} names and numbers from {self.least} to {self.most}; expected a "
                "name at least, and numbers from 0 up"
            )


class WriteFile:
    """An ``Environment``: every episode has an empty folder to work in, and succeeds with the right file in it.

    ``task(i)`` depends on configuration, seed and ``i`` only; held-out tasks are distinct and never trained on. Raises
    ConfigError where there are not as many tasks as are to be held out, and one to train on, or no sandbox can be had.
    """

    def __init__(self, config: WriteFileConfig, sandbox: SandboxConfig, *, eval_tasks: int, seed: int) -> None:
        if sandbox.kind == "bubblewrap":
            probe_bubblewrap(sandbox)
        self._config, self._sandbox = config, sandbox
        self._seed = seed
        there = len(config.names) * (config.most - config.least + 1)
        if eval_tasks >= there:
            raise ConfigError(
                f"tasks eval_tasks is {eval_tasks} and write_file has {there} tasks in all; lower it, or widen "
                "write_file.names or most"
            )
        self._held_out_pairs: set[tuple[str, int]] = set()
        self.held_out: Sequence[Task] = tuple(self._hold_out(index) for index in range(eval_tasks))

    def task(self, index: int) -> Task:
        """The training task at an absolute index."""
        return self._make("train", index, self._draw_new("train", index))

    async def open(self, task: Task) -> Workspace:
        if self._sandbox.kind == "none":
            return Workspace(directory=await asyncio.to_thread(make_scratch, "task"))
        sandbox = await asyncio.to_thread(make_bubblewrap, self._sandbox)
        return Workspace(directory=sandbox.work, sandbox=sandbox)

    async def close(self, workspace: Workspace) -> None:
        folder = workspace.directory if workspace.sandbox is None else workspace.sandbox.folder
        assert folder is not None
        await asyncio.to_thread(remove_tree, folder)

    def score(self, task: Task, workspace: Workspace, trajectory: Trajectory) -> Score:
        """1 where the file holds the number and nothing else but white space, else 0; whatever the agent says."""
        assert workspace.directory is not None
        file = workspace.directory / str(task.payload["file"])
        try:  # a link may lead out of the sandbox
            with os.fdopen(os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as opened:
                content = opened.read(_MOST_BYTES + 1)
        except OSError:
            return Score(outcome=0.0)
        right = len(content) <= _MOST_BYTES and content.strip() == str(task.payload["number"]).encode()
        return Score(outcome=float(right))

    def _hold_out(self, index: int) -> Task:
        pair = self._draw_new("evaluation", index)
        self._held_out_pairs.add(pair)
        return self._make("evaluation", index, pair)

    def _draw_new(self, split: str, index: int) -> tuple[str, int]:
        """The first draw for this index that is not held out."""
        config = self._config
        for attempt in range(_DRAWS):
            drawn = int.from_bytes(hashlib.blake2b(repr((self._seed, split, index, attempt)).encode()).digest()[:8])
            number, name = divmod(drawn, len(config.names))
            pair = config.names[name], config.least + number % (config.most - config.least + 1)
            if pair not in self._held_out_pairs:
                return pair
        raise ConfigError(
            f"tasks write_file: {_DRAWS} draws gave no task beside the {len(self._held_out_pairs)} held out; lower "
            "eval_tasks, or widen write_file.names or most"
        )

    def _make(self, split: str, index: int, pair: tuple[str, int]) -> Task:
        name, number = pair
        return Task(
            id=f"{split}-{index}",
            family="write_file",
            level="write_file",
            question=f"Write {number} to {name}.txt.",
            payload={"file": f"{name}.txt", "number": number, "answer": str(number)},
        )
