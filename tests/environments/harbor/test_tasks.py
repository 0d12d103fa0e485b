"""Task folders: what is read of them, and what is no task folder."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from forgejax.environments.harbor.tasks import HarborConfig, read_task, read_tasks
from forgejax.errors import ConfigError


def write_task(folder: Path, toml: str = 'version = "1.0"\n', instruction: str = "Do it.\n") -> Path:
    (folder / "tests").mkdir(parents=True)
    (folder / "task.toml").write_text(toml)
    (folder / "instruction.md").write_text(instruction)
    (folder / "tests" / "test.sh").write_text("echo 1 > /logs/verifier/reward.txt\n")
    return folder


def test_a_folder_is_read_with_the_defaults_of_the_format(tmp_path: Path) -> None:
    task = read_task(write_task(tmp_path / "a"), "a")
    assert (task.instruction, task.difficulty, task.category, task.verifier_s) == ("Do it.", "default", "harbor", 600.0)
    toml = (
        '[metadata]\ndifficulty = "hard"\ncategory = "git"\n[verifier]\ntimeout_sec = 9\nenv = {KEY = 1}\n'
        "[environment]\ngpus = 0\nallow_internet = true\nenv = {SET = 2}\n"
    )
    told = read_task(write_task(tmp_path / "b", toml), "b")
    assert (told.difficulty, told.category, told.verifier_s) == ("hard", "git", 9.0)
    assert dict(told.verifier_variables) == {"KEY": "1"} and told.placed.work == "/app"
    assert told.placed.variables == {"SET": "2"}


@pytest.mark.parametrize(
    ("toml", "instruction", "says"),
    [
        ("version =", "x", r"task\.toml cannot be read as TOML"),
        ('[environment]\ndocker_image = "x/y:1"\n', "x", r"the task needs the image x/y:1"),
        ("[environment]\ngpus = 1\n", "x", r"sets environment\.gpus; a task here is one instruction"),
        ("[environment.healthcheck]\ncommand = 'x'\n", "x", r"sets environment\.healthcheck"),
        ("[verifier]\nenvironment_mode = 'separate'\n", "x", r"sets verifier\.environment_mode"),
        ("[[steps]]\nname = 'a'\n", "x", r"sets steps"),
        ("verifier = 3\n", "x", r"verifier is 3; expected a table"),
        ('[verifier]\ntimeout_sec = "long"\n', "x", r"timeout_sec is 'long'; expected a number"),
        ("", " \n", r"instruction\.md is empty"),
    ],
)
def test_what_cannot_be_run_is_refused_in_a_sentence(tmp_path: Path, toml: str, instruction: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        read_task(write_task(tmp_path / "a", toml, instruction), "a")


def test_a_folder_without_tests_or_tasks_is_refused(tmp_path: Path) -> None:
    (write_task(tmp_path / "a") / "tests" / "test.sh").unlink()
    with pytest.raises(ConfigError, match=r"tests/test\.sh is missing"):
        read_tasks(HarborConfig(folder=str(tmp_path)), seed=0)
    (tmp_path / "empty").mkdir()
    for config, says in (
        (HarborConfig(folder=str(tmp_path / "empty")), "there is no task.toml below"),
        (HarborConfig(folder=str(tmp_path / "absent")), "which is no folder"),
        (HarborConfig(), "set either folder"),
        (HarborConfig(folder="x", make="y.py:z"), "set either folder"),
    ):
        with pytest.raises(ConfigError, match=says):
            read_tasks(config, seed=0)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("apt-get update -q", "apt-get update"),
        ("apt install -y curl", "apt install"),
        ("curl -LsSf https://example.com/install.sh | sh", "curl -LsSf https://example.com/install.sh"),
        ("uvx --with pytest pytest /tests/test_outputs.py", "uvx"),
        ("cd /app && pip install pytest", "pip install"),
        ("pip install --no-index /tests/tool.whl", None),
        ("curl -s http://127.0.0.1:8000/health", None),
        ("# apt-get install curl", None),
        ("python3 -m pytest /tests/test_outputs.py", None),
    ],
)
def test_tests_that_would_fail_for_want_of_a_network_are_refused(tmp_path: Path, line: str, found: str | None) -> None:
    script = write_task(tmp_path / "a") / "tests" / "test.sh"
    script.write_text(f"#!/bin/bash\n{line}\necho 1 > /logs/verifier/reward.txt\n")
    if found is None:
        assert read_task(tmp_path / "a", "a").name == "a"
        return
    with pytest.raises(ConfigError, match=re.escape(f"line 2: {found} needs a network, and tests have none")):
        read_task(tmp_path / "a", "a")


def test_all_folders_that_cannot_be_run_are_counted_and_some_named(tmp_path: Path) -> None:
    for name in "abcdefg":
        write_task(tmp_path / name, "steps = [1]\n" if name != "d" else "")
    with pytest.raises(ConfigError, match=r"6 of 7 task folders.* cannot be run here") as refused:
        read_tasks(HarborConfig(folder=str(tmp_path)), seed=0)
    assert str(refused.value).count("sets steps") == 5


def test_tasks_that_are_made_are_made_once_for_a_count_and_a_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "made.py").write_text(
        "from pathlib import Path\n"
        "def make(folder, count, seed):\n"
        f"    with open({str(tmp_path / 'calls')!r}, 'a') as calls: calls.write(f'{{count}} {{seed}};')\n"
        "    for i in range(count):\n"
        "        (folder / str(i) / 'tests').mkdir(parents=True)\n"
        "        for name in ('task.toml', 'tests/test.sh'): (folder / str(i) / name).write_text('')\n"
        "        (folder / str(i) / 'instruction.md').write_text(f'{seed} {i}')\n"
    )
    monkeypatch.chdir(tmp_path)
    config = HarborConfig(make="made.py:make", count=2)
    assert [task.instruction for task in read_tasks(config, seed=7)] == ["7 0", "7 1"]
    assert [task.instruction for task in read_tasks(config, seed=7)] == ["7 0", "7 1"]
    read_tasks(config, seed=8)
    assert (tmp_path / "calls").read_text() == "2 7;2 8;"
