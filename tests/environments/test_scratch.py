"""Temporary folders: none outlives its process for longer than until the next one begins."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from forgejax.environments import scratch
from forgejax.environments.scratch import make_scratch, remove_tree

PROGRAM = f"""
import runpy, sys
print(runpy.run_path({scratch.__file__!r})["make_scratch"]("episode"), flush=True)
sys.stdin.read()
"""


def start_one(place: Path) -> tuple[subprocess.Popen[str], Path]:
    """Another process, and a folder that it has made and lives for."""
    command = [sys.executable, "-I", "-S", "-c", PROGRAM]
    environment = {"TMPDIR": str(place)}
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_the_next_process_removes_what_a_killed_one_has_left_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    killed, left = start_one(tmp_path)
    alive, held = start_one(tmp_path)
    (left / "work").mkdir()
    killed.kill()
    killed.communicate()
    others = tmp_path / "forgejax-others"
    others.mkdir()
    assert left.is_dir() and left.parent != held.parent

    first, second = make_scratch("task"), make_scratch("episode")

    assert first.parent == second.parent and first != second and list(first.iterdir()) == []
    assert sorted(tmp_path.iterdir()) == sorted([held.parent, first.parent, others])
    assert held.is_dir()
    alive.communicate(timeout=30)
    assert not held.parent.exists(), "a process that ends in order takes its own away"


def test_a_folder_is_made_anew_where_something_has_removed_the_process_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    root = make_scratch("task").parent
    scratch._remove(root, -1)
    assert root.is_dir(), "it is another process's"
    scratch._remove(root, os.getpid())
    assert make_scratch("task").is_dir() and not root.exists()


def test_a_removal_that_is_cut_off_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    killed, left = start_one(tmp_path)
    killed.kill()
    killed.communicate()

    def cut_off(place: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(scratch, "remove_tree", cut_off)
        with pytest.raises(KeyboardInterrupt):
            scratch.remove_orphans(tmp_path)
    assert left.is_dir()
    scratch.remove_orphans(tmp_path)
    assert list(tmp_path.iterdir()) == []


def make_deep(place: Path, levels: int) -> None:
    """Folders in one another, below ``place``."""
    here = os.open(place, os.O_RDONLY)
    for _ in range(levels):
        os.mkdir("d", dir_fd=here)
        inner = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    os.close(here)


def test_a_tree_is_removed_however_deep_shut_or_linked(tmp_path: Path) -> None:
    tree, other = tmp_path / "tree", tmp_path / "other"
    other.mkdir()
    (other / "kept").write_text("")
    (tree / "shut" / "inner").mkdir(parents=True)
    (tree / "shut" / "inner" / "file").write_text("")
    (tree / "shut" / "out").symlink_to(other)
    os.mkfifo(tree / "fifo")
    make_deep(tree, 2100)
    for folder in (tree / "shut" / "inner", tree / "shut"):
        folder.chmod(0o000)
    remove_tree(tree)
    remove_tree(tree)
    (tmp_path / "link").symlink_to(other)
    remove_tree(tmp_path / "link")
    assert [path.name for path in tmp_path.iterdir()] == ["other"] and (other / "kept").exists()
