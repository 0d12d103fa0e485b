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
    with pytest.raises(ConfigError, match=r"mine already; choose another --run\.name, or go on with --resume=.*mine"):
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
    with pytest.raises(ConfigError, match=r"there is no run '' to resume under .*; runs there: none; give its folder"):
        rundir.reopen(tmp_path, "")
    made(tmp_path, "mine")
    (tmp_path / "no-run").mkdir()
    with pytest.raises(ConfigError, match=r"there is no run 'yours' to resume under .*; runs there: mine"):
        rundir.reopen(tmp_path, "yours")


def test_a_run_that_cannot_be_written_to_is_one_sentence(tmp_path: Path) -> None:
    path = made(tmp_path, "mine")
    (path / "lock").unlink()
    (path / "lock").mkdir()  # as good as a folder that is read-only, which nothing is to root
    with pytest.raises(
        ConfigError, match=r"the run in .*mine cannot be written to: .*; correct its permissions, or copy"
    ):
        rundir.reopen(tmp_path, "mine")


def test_a_run_with_checkpoints_and_without_its_journal_is_refused_and_let_go(tmp_path: Path) -> None:
    path = made(tmp_path, "mine")
    (path / "checkpoints" / "10").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"mine has checkpoints and no journal\.sqlite, which knows what they were"):
        rundir.reopen(tmp_path, "mine")
    (path / "journal.sqlite").touch()
    run = rundir.reopen(tmp_path, "mine")
    assert run.has_checkpoint
    run.close()


def test_names_that_no_journal_can_lie_under_are_avoided_or_refused(tmp_path: Path) -> None:
    assert made(tmp_path, stem="my run?").name == "my-run--1"
    with pytest.raises(ConfigError, match=r"no journal can lie in .*what\?, for the \? in its name; set --run\.root"):
        rundir.create(tmp_path / "what?", "", "quickstart")


def test_the_history_keeps_every_attempt_with_what_it_changed_and_what_was_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = rundir.create(tmp_path, "mine", "")
    run.save_config({"run": {"steps": 10, "seed": 0}, "agent": {"command": ("a", "b")}}, tokenizer="abc")
    run.note_restored(0, 0)
    run.save_config({"run": {"steps": 20, "seed": 0}, "agent": {"command": ("a",)}, "new": 1}, tokenizer="abc")
    run.close()

    first, second = rundir.read_history(run.path)
    assert (first.folder, first.process, first.tokenizer) == (str(tmp_path), os.getpid(), "abc")
    assert (first.changed, first.step, first.steps_lost) == ({}, 0, 0)
    assert second.changed == {"run.steps": (10, 20), "agent.command": (["a", "b"], ["a"])}
    assert second.step is None, "it has not got there yet"
    run.note_restored(8, 3)
    second = rundir.read_history(run.path)[1]
    assert second.describe() == (
        'from step 8, 3 steps after it are done again; changed: run.steps 10 -> 20, agent.command ["a", "b"] -> ["a"]'
    )
    assert first.describe() == "from step 0, no step is lost; changed: nothing"


def test_a_torn_or_damaged_line_of_the_history_harms_no_other(tmp_path: Path) -> None:
    run = rundir.create(tmp_path, "mine", "")
    assert rundir.read_history(run.path) == []
    run.save_config({})
    file = run.path / "history.jsonl"
    file.write_bytes(file.read_bytes() + b'\xff{]\n[1]\n{"step": "x"}\n{"started_at": 3}\n{"step": 5, "st')
    run.note_restored(4, 2)
    run.close()

    (attempt,) = rundir.read_history(run.path)
    assert (attempt.step, attempt.steps_lost) == (4, 2)


def test_changes_are_told_by_dotted_keys() -> None:
    before = {"a": {"b": 1, "c": {"d": [1, {"e": 2}]}, "gone": 1}, "f": {}, "g": 0.5}
    now = {"a": {"b": 1, "c": {"d": (1, {"e": 3})}, "new": 1}, "f": {"h": 1}, "g": 0.5}
    assert rundir.list_changes(before, now) == {"a.c.d": ([1, {"e": 2}], [1, {"e": 3}])}


def test_the_configuration_comes_back_as_it_was_and_a_damaged_one_is_an_error(tmp_path: Path) -> None:
    run = rundir.create(tmp_path, "mine", "quickstart")
    run.save_config({"mesh": {"name": "cpu-2"}, "agent": {"command": ["é"]}})

    assert rundir.saved_config(run.path) == {"mesh": {"name": "cpu-2"}, "agent": {"command": ["é"]}}
    (run.path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"config\.json cannot be read"):
        rundir.saved_config(run.path)
    run.close()
