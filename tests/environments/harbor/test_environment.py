"""Tasks in Harbor's format, played and scored in sandboxes."""

from __future__ import annotations

import asyncio
import os
import stat
import sys
from pathlib import Path
from typing import Any

import pytest

from forgejax.agents import AgentConfig, EpisodeRunner, ProcessScaffold
from forgejax.environments import Workspace
from forgejax.environments.harbor import Harbor, HarborConfig
from forgejax.environments.harbor.environment import read_reward
from forgejax.environments.sandbox import SandboxConfig
from forgejax.errors import ConfigError, UnscoredError
from forgejax.imports import load_object
from forgejax.types import SessionSpec, StopReason, Task
from tests.agents.fakes import FakeSessions, make_trajectory
from tests.environments.harbor.test_tasks import write_task
from tests.environments.sandbox.machine import needs_sandboxes

pytestmark = needs_sandboxes

SMALL = SandboxConfig(processes=32, memory_mib=256, disk_mib=32, file_mib=8)


def make(folder: Path, *, eval_tasks: int = 0, sandbox: SandboxConfig = SMALL) -> Harbor:
    return Harbor(HarborConfig(folder=str(folder)), sandbox, eval_tasks=eval_tasks, seed=3, score_s=10.0)


def write_test(folder: Path, script: str, solution: str = "") -> Path:
    write_task(folder)
    (folder / "tests" / "test.sh").write_text(script)
    (folder / "solution").mkdir()
    (folder / "solution" / "solve.sh").write_text(solution)
    return folder


def score(harbor: Harbor, task: Task, before: str = "true") -> float:
    """What the task's tests say of what ``before`` leaves in its sandbox."""

    async def play() -> float:
        workspace = await harbor.open(task)
        try:
            await asyncio.to_thread(run_inside, workspace, before)
            return (await asyncio.to_thread(harbor.score, task, workspace, make_trajectory())).outcome
        finally:
            await harbor.close(workspace)
            assert workspace.sandbox is not None and not workspace.sandbox.folder.exists()

    return asyncio.run(play())


def run_inside(workspace: Workspace, script: str) -> None:
    assert workspace.sandbox is not None
    output = workspace.sandbox.folder / "said"
    workspace.sandbox.run(["bash", "-c", script], deadline_s=20.0, output=output, show={}, environment={})


def test_held_out_tasks_are_never_trained_and_each_epoch_has_every_other_once(tmp_path: Path) -> None:
    for name in "abcdefg":
        write_task(tmp_path / name, instruction=name)
    harbor, again = make(tmp_path, eval_tasks=2), make(tmp_path, eval_tasks=2)
    held_out = {task.question for task in harbor.held_out}
    epochs = [[harbor.task(index).question for index in range(start, start + 5)] for start in (0, 5)]
    assert len(held_out) == 2 and all(set(epoch) == set("abcdefg") - held_out for epoch in epochs)
    assert epochs[0] != epochs[1] and [again.task(index) for index in range(9)] == [
        harbor.task(index) for index in range(9)
    ]
    with pytest.raises(ConfigError, match="eval_tasks is 7 and there are 7 tasks"):
        make(tmp_path, eval_tasks=7)
    with pytest.raises(ConfigError, match=r"sandbox\.kind is \"none\""):
        make(tmp_path, sandbox=SandboxConfig(kind="none"))


def test_each_kind_of_shell_task_is_done_by_its_solution_and_not_by_nothing(tmp_path: Path) -> None:
    kinds = load_object("examples/shell/make_tasks.py:KINDS", "the kinds of tasks")
    load_object("examples/shell/make_tasks.py:write_tasks", "what writes them")(tmp_path, len(kinds), 5)
    harbor = make(tmp_path)
    for index in range(len(kinds)):
        task = harbor.task(index)
        solution = (tmp_path / str(task.payload["task"]) / "solution" / "solve.sh").read_text()
        assert (score(harbor, task), score(harbor, task, solution)) == (0.0, 1.0), task.question


def test_an_agents_own_reward_does_not_count_and_a_missing_or_senseless_one_is_no_score(tmp_path: Path) -> None:
    own = "mkdir -p /logs/verifier; echo 1 > /logs/verifier/reward.txt; ln -s / /logs/verifier/x"
    odd = "test -d /logs/agent && mkfifo /logs/verifier"
    for name, test in (
        ("0", "cat /tests/test.sh > /dev/null && echo 0.25 > /logs/verifier/reward.txt"),
        ("1", "echo 'no compiler'; exit 3"),
        ("2", "echo much > /logs/verifier/reward.txt"),
        ("3", "ln -s /etc/passwd /logs/verifier/reward.txt"),
        ("4", "sleep 60"),
    ):
        write_test(tmp_path / name, test)
    harbor = Harbor(HarborConfig(folder=str(tmp_path)), SMALL, eval_tasks=0, seed=0, score_s=2.0)
    tasks = {str(harbor.task(index).payload["task"]): harbor.task(index) for index in range(5)}
    assert score(harbor, tasks["0"], own) == score(harbor, tasks["0"], odd) == 0.25
    for name, says in (
        ("1", r"status 3.*no compiler"),
        ("2", "much"),
        ("3", "no reward"),
        ("4", "did not end in time"),
    ):
        with pytest.raises(UnscoredError, match=says):
            score(harbor, tasks[name], own)


@pytest.mark.parametrize(
    ("text", "reward"), [('{"reward": 0.5, "style": 1}', 0.5), ('{"passed": 1}', 1.0), ("0.75", 0.75)]
)
def test_a_reward_in_text_stands_before_the_one_in_json(tmp_path: Path, text: str, reward: float) -> None:
    (tmp_path / "reward.json").write_text(text)
    assert read_reward(tmp_path) == reward
    (tmp_path / "reward.txt").write_text("0.1\n")
    assert read_reward(tmp_path) == 0.1


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("reward.txt", "nan"),
        ("reward.txt", ""),
        ("reward.json", '{"a": 1, "b": 0}'),
        ("reward.json", '{"reward": 1e999}'),
    ],
)
def test_what_is_no_finite_number_is_no_reward(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UnscoredError, match=r"expected (an object with )?a number"):
        read_reward(tmp_path)


async def test_an_agent_plays_in_the_sandbox_and_its_tests_see_what_it_did(tmp_path: Path) -> None:
    write_test(tmp_path / "tasks" / "a", "[ $(cat done.txt) = right ] && echo 1 > /logs/verifier/reward.txt")
    agent = tmp_path / "agent.py"
    agent.write_text(
        "import os, sys\n"
        f"print([os.getcwd(), sys.argv[1], os.environ.get('SECRET'), os.path.exists({str(tmp_path / 'tasks')!r})])\n"
        "open('done.txt', 'w').write('right')\n"
        "os.system('setsid sleep 71.5 &')\n"
    )
    agent.chmod(agent.stat().st_mode | stat.S_IROTH)
    os.environ["SECRET"] = "no"
    config = AgentConfig(kind="process", command=(sys.executable, str(agent)), deadline_s=30.0)
    scaffold, harbor, sessions = ProcessScaffold(config), make(tmp_path / "tasks"), FakeSessions()
    await scaffold.start()
    try:
        runner = EpisodeRunner(sessions=sessions, scaffold=scaffold, environment=harbor, agent=config)
        played: Any = await runner.run(harbor.task(0), session=SessionSpec(purpose="evaluation"))
    finally:
        del os.environ["SECRET"]
        await scaffold.close()
    assert (played.stop_reason, played.outcome, played.error) == (StopReason.COMPLETED, 1.0, None)
    assert played.answer == str(["/app", "Do it.", None, False])
