"""What `make scaffolds` does, without a network: npm is a script."""

import os
from pathlib import Path

import pytest

from forgejax.agents.recipes import InstallConfig
from forgejax.errors import ForgejaxError
from scripts import install_scaffolds
from scripts.install_scaffolds import LOG, Options, install, main


def test_packages_go_into_a_folder_of_their_own_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    npm = tmp_path / "npm"
    npm.write_text('#!/bin/sh\necho "npm $*"\ncase "$*" in *bad*) exit 3;; esac\n')
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    folder, wanted = tmp_path / "installed", InstallConfig(npm=("good@1.0", "@a/b@2"))
    assert install(wanted, folder).startswith("good@1.0, @a/b@2 installed in ")
    assert (folder / LOG).read_text() == f"npm install --prefix {folder} --no-audit --no-fund good@1.0 @a/b@2\n"
    assert install(wanted, folder) == "good@1.0, @a/b@2 are there already"
    with pytest.raises(ForgejaxError, match=r"(?s)ended with status 3; the end of .*no-fund bad@1"):
        install(InstallConfig(npm=("bad@1",)), folder)
    assert not (folder / install_scaffolds.STAMP).exists()


def test_without_node_what_needs_it_is_left_out_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", os.devnull)
    monkeypatch.setattr(install_scaffolds, "INSTALLED", tmp_path)
    assert main(Options(names=("codex", "any-command"))) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("codex: left out: @openai/codex@") and told[0].endswith("there is no npm on PATH")
    assert told[1] == "any-command: nothing to install"
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_recipe_fails_and_the_others_are_installed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(Options(names=("no-such", "any-command"))) == 1
    output = capsys.readouterr()
    assert 'there is no recipe "no-such"' in output.err and output.out == "any-command: nothing to install\n"
