"""Tasks of writing a file, and what of a folder counts as done."""

from pathlib import Path

import pytest

from forgejax.environments import Workspace, WriteFile, WriteFileConfig
from forgejax.environments.sandbox import SandboxConfig
from forgejax.errors import ConfigError
from tests.agents.fakes import make_trajectory

OPEN = SandboxConfig(kind="none")
SMALL = WriteFileConfig(names=("a", "b"), least=0, most=9)


def test_no_training_task_is_held_out_and_each_depends_on_its_index_only() -> None:
    tasks, again = WriteFile(SMALL, OPEN, eval_tasks=19, seed=3), WriteFile(SMALL, OPEN, eval_tasks=19, seed=3)
    held_out = {task.question for task in tasks.held_out}
    assert len(held_out) == 19
    assert {tasks.task(index).question for index in range(50)}.isdisjoint(held_out)  # the one that is left
    assert [tasks.task(index) for index in range(5)] == [again.task(index) for index in range(5)]
    assert WriteFile(SMALL, OPEN, eval_tasks=0, seed=4).task(0) != WriteFile(SMALL, OPEN, eval_tasks=0, seed=3).task(0)


@pytest.mark.parametrize(
    ("files", "outcome"),
    [
        ({"a.txt": "7"}, 1.0),
        ({"a.txt": " 7\n", "other": "1"}, 1.0),
        ({}, 0.0),
        ({"a.txt": "77"}, 0.0),
        ({"a.txt": "7 7"}, 0.0),
        ({"a.txt": "7" + " " * 2000 + "8"}, 0.0),
        ({"b.txt": "7"}, 0.0),
    ],
)
def test_the_file_is_what_counts(tmp_path: Path, files: dict[str, str], outcome: float) -> None:
    tasks = WriteFile(SMALL, OPEN, eval_tasks=0, seed=0)
    task = next(each for each in map(tasks.task, range(1000)) if each.question == "Write 7 to a.txt.")
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert tasks.score(task, Workspace(directory=tmp_path), make_trajectory(answer="7")).outcome == outcome


def test_a_folder_under_the_files_name_is_no_file(tmp_path: Path) -> None:
    tasks = WriteFile(SMALL, OPEN, eval_tasks=0, seed=0)
    (tmp_path / str(tasks.task(0).payload["file"])).mkdir()
    assert tasks.score(tasks.task(0), Workspace(directory=tmp_path), make_trajectory()).outcome == 0.0


async def test_every_episode_has_an_empty_folder_of_its_own_which_goes_with_it() -> None:
    tasks = WriteFile(SMALL, OPEN, eval_tasks=0, seed=0)
    first, second = await tasks.open(tasks.task(0)), await tasks.open(tasks.task(0))
    assert first.directory is not None and second.directory is not None and first.directory != second.directory
    (first.directory / "x").write_text("x")
    assert list(second.directory.iterdir()) == []
    await tasks.close(first)
    await tasks.close(second)
    assert not first.directory.exists() and not second.directory.exists()


def test_a_configuration_without_enough_tasks_is_refused() -> None:
    with pytest.raises(ConfigError, match="eval_tasks is 20 and write_file has 20 tasks in all"):
        WriteFile(SMALL, OPEN, eval_tasks=20, seed=0)
    with pytest.raises(ConfigError, match='names has "a b"; expected words'):
        WriteFileConfig(names=("a b",))
    with pytest.raises(ConfigError, match="numbers from 5 to 5"):
        WriteFileConfig(least=5, most=5)
