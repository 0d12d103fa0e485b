"""What a sandbox has on the disk."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from forgejax.environments.sandbox import SandboxConfig
from forgejax.environments.sandbox.processes import Root
from forgejax.environments.sandbox.watch import Watched, measure_folder
from forgejax.environments.scratch import remove_tree
from tests.environments.test_scratch import make_deep


def test_what_lies_deeper_than_a_path_can_name_is_more_than_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "file").write_bytes(bytes(8192))
    blocks = sum(path.stat().st_blocks for path in (tmp_path / "sub", tmp_path / "sub" / "file"))
    assert measure_folder(tmp_path, 1 << 30) == (blocks * 512, 2)
    assert measure_folder(tmp_path, 4096)[0] > 4096 and measure_folder(tmp_path / "absent", 1) == (0, 0)
    make_deep(tmp_path, 2100)
    files = measure_folder(tmp_path, 1 << 30)[1]
    remove_tree(tmp_path / "d")
    assert files > 200_000


def test_files_are_counted_seldom_unless_the_disk_fills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = 1000
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result((1, 2**20, 0, 0, free, 0, 0, 0, 0, 0)))
    watched = Watched(root=Root(process=1, began=0), folders=(tmp_path,), config=SandboxConfig(disk_mib=100))
    watched.judge({})
    now = time.monotonic()
    watched._due = now + 1000.0
    (tmp_path / "file").write_bytes(bytes(101 << 20))
    free = 950
    watched.judge({})
    assert watched.exceeded is None
    free = 899
    watched.judge({})
    assert watched.exceeded == "it wrote 101 MiB to the disk and was ended; raise tasks sandbox.disk_mib from 100"
