"""Harbor's task folders as an environment: each episode in a sandbox of its own, its reward from the task's tests."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import json
import math
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from forgejax.environments.base import Score, Workspace
from forgejax.environments.harbor.tasks import HarborConfig, HarborTask, read_tasks
from forgejax.environments.sandbox import Bubblewrap, SandboxConfig, make_bubblewrap, probe_bubblewrap
from forgejax.environments.scratch import remove_tree
from forgejax.errors import ConfigError, UnscoredError
from forgejax.types import Task, Trajectory

_MOST_BYTES = 64 * 1024  # of a reward, and of what the tests said last
_TOLD = 500  # characters of it
_END_S = 2.0  # of the time to score in, for the end of tests that do not end themselves


class Harbor:
    """An ``Environment`` of task folders. Held-out tasks are drawn by the seed; the others are trained in its order,
    and in another one each time they have all been.

    The agent works in the task's own directory, sees neither tests nor solution, and its processes are gone before the
    tests run. Raises ConfigError for a folder that cannot be run, too few tasks, or a machine without sandboxes.
    """

    def __init__(self, config: HarborConfig, sandbox: SandboxConfig, *, eval_tasks: int, seed: int, score_s: float):
        if sandbox.kind != "bubblewrap":
            raise ConfigError(
                f'tasks sandbox.kind is "{sandbox.kind}"; tasks in Harbor\'s format write outside their folder (/logs) '
                'and need "bubblewrap"'
            )
        probe_bubblewrap(sandbox)
        self._sandbox, self._seed, self._score_s = sandbox, seed, score_s
        tasks = read_tasks(config, seed)
        self._tasks = {task.name: task for task in tasks}
        names = sorted(self._tasks, key=lambda name: _draw(seed, name))
        if eval_tasks >= len(names):
            raise ConfigError(
                f"tasks eval_tasks is {eval_tasks} and there are {len(names)} tasks in all; lower it, or bring more"
            )
        self._trained = tuple(names[eval_tasks:])
        self._get_order = functools.lru_cache(maxsize=4)(self._order)
        self.held_out: Sequence[Task] = tuple(
            self._make(f"evaluation-{index}", name) for index, name in enumerate(names[:eval_tasks])
        )

    def task(self, index: int) -> Task:
        """The training task at an absolute index."""
        epoch, place = divmod(index, len(self._trained))
        return self._make(f"train-{index}", self._get_order(epoch)[place])

    async def open(self, task: Task) -> Workspace:
        """A sandbox with the task's files in it."""
        making = asyncio.ensure_future(asyncio.to_thread(self._open, self._tasks[str(task.payload["task"])]))
        try:
            return await asyncio.shield(making)
        except asyncio.CancelledError:
            making.add_done_callback(_remove_made)
            raise

    async def close(self, workspace: Workspace) -> None:
        assert workspace.sandbox is not None
        await asyncio.to_thread(remove_tree, workspace.sandbox.folder)

    def score(self, task: Task, workspace: Workspace, trajectory: Trajectory) -> Score:
        """What the task's tests say. Raises UnscoredError where they say nothing that is a reward."""
        sandbox, of = workspace.sandbox, self._tasks[str(task.payload["task"])]
        assert sandbox is not None
        verifier = sandbox.logs / "verifier"
        remove_tree(verifier)  # the agent may have left something there
        verifier.mkdir()
        output = verifier / "test-stdout.txt"
        output.touch()
        sandbox.give(verifier)
        ran = sandbox.run(
            ["bash", "/tests/test.sh"],
            deadline_s=min(of.verifier_s, self._score_s - min(_END_S, 0.1 * self._score_s)),
            output=output,
            show={of.tests: "/tests"},
            environment={**of.placed.variables, **of.verifier_variables},
        )
        outcome = read_reward(verifier)
        if outcome is None or ran.status is None:
            how = ran.exceeded or ("they did not end in time" if ran.status is None else f"status {ran.status}")
            said = (_read(output) or "").strip()[-_TOLD:] or "nothing"
            raise UnscoredError(f"the tests of task {of.name} gave no reward ({how}); they said last: {said}")
        return Score(outcome=outcome)

    def _open(self, task: HarborTask) -> Workspace:
        sandbox = make_bubblewrap(self._sandbox, task.placed.work)
        task.placed.lay(sandbox.work)
        (sandbox.logs / "agent").mkdir()
        for place in (sandbox.work, sandbox.logs):
            sandbox.give(place)
        return Workspace(variables=dict(task.placed.variables), directory=sandbox.work, sandbox=sandbox)

    def _order(self, epoch: int) -> list[str]:
        names = list(self._trained)
        random.Random(_draw(self._seed, f"epoch {epoch}")).shuffle(names)
        return names

    def _make(self, id: str, name: str) -> Task:
        task = self._tasks[name]
        return Task(
            id=id,
            family=f"{task.category}/{task.difficulty}",
            level=task.difficulty,
            question=task.instruction,
            payload={"task": name},
        )


def read_reward(verifier: Path) -> float | None:
    """From ``reward.txt``, else ``reward.json`` (the value of ``reward``, or the only one), in Harbor's own order; None
    where there is neither.

    Raises UnscoredError for one that is no finite number.
    """
    text = _read(verifier / "reward.txt")
    if text is not None:
        try:
            return _require_finite(text.strip())
        except ValueError as error:
            raise UnscoredError(f"reward.txt holds {text[:_TOLD]!r}; expected a number") from error
    text = _read(verifier / "reward.json")
    if text is None:
        return None
    try:
        told = json.loads(text)
        value: Any = told
        if isinstance(told, dict):
            value = told["reward"] if "reward" in told else _get_only(told)
        return _require_finite(value)
    except (ValueError, TypeError, KeyError) as error:
        raise UnscoredError(
            f"reward.json holds {text[:_TOLD]!r}; expected an object with a number named reward"
        ) from error


def _require_finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{number} is no finite number")
    return number


def _get_only(told: dict[str, Any]) -> Any:
    if len(told) != 1:
        raise KeyError("reward")
    return next(iter(told.values()))


def _read(file: Path) -> str | None:
    """The beginning of a file of the sandbox; None where it is none, a link among them, for that may lead anywhere."""
    try:
        opened = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    with os.fdopen(opened, "rb") as found:
        size = os.fstat(opened).st_size
        found.seek(max(0, size - _MOST_BYTES))
        return found.read(_MOST_BYTES).decode("utf-8", errors="replace")


def _remove_made(made: asyncio.Future[Workspace]) -> None:
    """Takes away what was opened for nobody."""
    if not made.cancelled() and made.exception() is None:
        sandbox: Bubblewrap | None = made.result().sandbox
        assert sandbox is not None
        remove_tree(sandbox.folder)


def _draw(seed: int, of: str) -> int:
    return int.from_bytes(hashlib.blake2b(repr((seed, of)).encode(), digest_size=8).digest())
