"""Where a run lives, and the lock that keeps a second trainer out."""

import os
from pathlib import Path

import pytest

from forgejax.errors import ConfigError, RunLockedError
from forgejax.run import rundir


def made(root: Path, name: str = "", stem: str = "quickstart") -> Path:
    """A run that has ended."""
    run = rundir.create(root, name, stem)
    run.save_config({"run": {"name": run.name}})
    run.close()
    return run.path


def test_runs_without_a_name_are_numbered_after_the_highest(tmp_path: Path) -> None:
    (tmp_path / "quickstart-7").mkdir()
    (tmp_path / "quickstart-12b").mkdir()

    assert made(tmp_path) == tmp_path / "quickstart-8"
    assert made(tmp_path) == tmp_path / "quickstart-9"
    assert made(tmp_path, stem="other") == tmp_path / "other-1"


def test_a_name_that_is_taken_is_refused_with_what_to_do(tmp_path: Path) -> None:
    made(tmp_path, "mine")
    with pytest.raises(ConfigError, match=r"mine already; choose another --run\.name, or go on with --resume=mine"):
        rundir.create(tmp_path, "mine", "quickstart")


def test_a_root_that_cannot_be_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot be made.*set --run\.root"):
        rundir.create(tmp_path / "file", "", "quickstart")


def test_a_second_trainer_is_kept_out_and_told_of_the_first(tmp_path: Path) -> None:
    first = rundir.create(tmp_path, "mine", "quickstart")
    first.save_config({})

    with pytest.raises(RunLockedError, match=rf"another trainer \(process {os.getpid()}\) is at work"):
        rundir.reopen(tmp_path, "mine")
    first.close()
    again = rundir.reopen(tmp_path, "mine")
    assert (again.path, again.resumed, first.resumed) == (first.path, True, False)
    again.close()


def test_without_a_name_the_newest_run_is_reopened(tmp_path: Path) -> None:
    older, newer = made(tmp_path, "b"), made(tmp_path, "a")
    os.utime(older / "config.json", (1, 1))

    run = rundir.reopen(tmp_path, "")
    assert run.path == newer
    run.close()


def test_a_run_may_be_named_by_its_path(tmp_path: Path) -> None:
    path = made(tmp_path / "elsewhere", "mine")

    run = rundir.reopen(tmp_path / "runs", str(path))
    assert run.path == path
    run.close()


def test_nothing_to_resume_is_answered_with_the_runs_there_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no run '' to resume under .*; runs there: none"):
        rundir.reopen(tmp_path, "")
    made(tmp_path, "mine")
    (tmp_path / "no-run").mkdir()
    with pytest.raises(ConfigError, match=r"there is no run 'yours' to resume under .*; runs there: mine"):
        rundir.reopen(tmp_path, "yours")


def test_the_configuration_comes_back_as_it_was_and_a_damaged_one_is_an_error(tmp_path: Path) -> None:
    run = rundir.create(tmp_path, "mine", "quickstart")
    run.save_config({"mesh": {"name": "cpu-2"}, "agent": {"command": ["é"]}})

    assert rundir.saved_config(run.path) == {"mesh": {"name": "cpu-2"}, "agent": {"command": ["é"]}}
    (run.path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"config\.json cannot be read"):
        rundir.saved_config(run.path)
    run.close()
