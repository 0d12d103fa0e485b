"""What a sandbox is told to show."""

from __future__ import annotations

from pathlib import Path

import pytest

from forgejax.environments.sandbox import SandboxConfig
from forgejax.errors import ConfigError


def test_nothing_is_shown_in_which_other_episodes_have_their_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    for path in ("/", "/tmp", "/proc", str(tmp_path), str(tmp_path / "temporary"), str(tmp_path / "link")):
        with pytest.raises(ConfigError, match="name what is needed below it"):
            SandboxConfig(read=(path,))
    with pytest.raises(ConfigError, match="is not there"):
        SandboxConfig(read=(str(tmp_path / "absent"),))
    with pytest.raises(ConfigError, match="memory_mib is 0"):
        SandboxConfig(memory_mib=0)
    (tmp_path / "data").mkdir()
    assert SandboxConfig(read=(str(tmp_path / "data"),)).memory_bytes == 2048 * 2**20
