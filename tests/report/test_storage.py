import errno
import os
from pathlib import Path

import pytest

from forgejax.errors import ConfigError, StorageFullError
from forgejax.report.storage import storage_errors, write_atomic


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_write_that_fails_leaves_the_old_file_and_no_scratch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    path = tmp_path / "summary.json"
    write_atomic(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageFullError, match=f"Free space under {tmp_path}"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_any_other_trouble_with_a_file_is_about_the_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Permission denied"), storage_errors(tmp_path):
        raise PermissionError(errno.EACCES, "Permission denied")
    with pytest.raises(ZeroDivisionError), storage_errors(tmp_path):
        _ = 1 // 0
