"""What a process finds of its own: values, a home with files, a folder to work in."""

import dataclasses
import sys
from pathlib import Path

import pytest

from forgejax.agents import AgentConfig
from forgejax.agents.scaffolds.lodging import prepare_lodging
from forgejax.environments import Workspace
from forgejax.errors import AgentError, ConfigError
from tests.agents.fakes import make_episode
from tests.agents.scaffolds.test_process import play

WITH_FILES = AgentConfig(
    kind="process",
    command=("program", "{home}/x", "{question}"),
    files={".config/a.json": '{"url": "{base_url}", "model": "{model}", "tokens": {context}, "other": {x}}'},
)


def test_files_are_written_into_a_home_of_the_episodes_own_and_go_with_it() -> None:
    episode = make_episode(question="{api_key} {home}")
    first, second = prepare_lodging(WITH_FILES, episode), prepare_lodging(WITH_FILES, episode)
    home = Path(first.values["home"])
    assert first.values["home"] != second.values["home"]
    assert (home / ".config/a.json").read_text() == (
        '{"url": "http://127.0.0.1:1/v1", "model": "policy", "tokens": 4096, "other": {x}}'
    )
    assert first.fill("{question}!") == "{api_key} {home}!"  # what a question says is never filled
    assert first.directory is not None and first.directory != home and list(first.directory.iterdir()) == []
    for lodging in (first, second):
        assert lodging.root is not None
        lodging.leave()
        assert not lodging.root.exists()


def test_a_workspaces_folder_is_worked_in_before_one_of_its_own(tmp_path: Path) -> None:
    episode = dataclasses.replace(make_episode(), workspace=Workspace(directory=tmp_path))
    lodging = prepare_lodging(WITH_FILES, episode)
    assert lodging.directory == tmp_path
    lodging.leave()
    assert tmp_path.exists()


def test_a_program_that_asks_for_no_home_gets_none() -> None:
    lodging = prepare_lodging(AgentConfig(kind="process", command=("program",)), make_episode())
    assert (lodging.directory, lodging.root) == (None, None)


def test_a_home_that_cannot_be_made_is_an_agents_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    with pytest.raises(AgentError, match="the home of an episode cannot be made"):
        prepare_lodging(WITH_FILES, make_episode())


async def test_the_answer_may_be_in_a_file_and_is_read_whole() -> None:
    source = "import sys; open(sys.argv[1], 'w').write('one\\ntwo\\n'); print('noise')"
    command = (sys.executable, "-I", "-S", "-c", source, "{home}/answer", "{question}")
    config = AgentConfig(kind="process", command=command, answer_file="{home}/answer")
    assert (await play(config)).answer == "one\ntwo"
    silent = dataclasses.replace(config, command=(sys.executable, "-I", "-S", "-c", "print('noise')", "{question}"))
    assert (await play(silent)).answer is None


@pytest.mark.parametrize("name", ["/etc/x", "../x", "a/../../x", "~/x"])
def test_a_file_outside_the_home_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="expected a path inside the home"):
        AgentConfig(kind="process", command=("p",), files={name: ""})


def test_files_belong_to_processes() -> None:
    with pytest.raises(ConfigError, match='belong to kind "process"'):
        AgentConfig(kind="worker", command=("p",), files={"a": ""})
