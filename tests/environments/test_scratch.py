"""Temporary folders: none outlives its process for longer than until the next one begins."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from forgejax.environments import scratch
from forgejax.environments.scratch import make_scratch

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
