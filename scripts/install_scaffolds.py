"""Installs the agent programs of recipes (configs/scaffolds), each into a folder of its own below .scaffolds.

    python scripts/install_scaffolds.py                # all of them
    python scripts/install_scaffolds.py codex aider    # these

npm packages need Node.js and its npm; where they are not there, the recipes that want them are left out, and that is
said. What is installed already, in the same versions, is left alone.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from forgejax.agents.recipes import INSTALLED, InstallConfig, list_recipes, load_recipe
from forgejax.errors import ForgejaxError

STAMP = ".complete"
LOG = "install.log"
INSTALL_S = 900.0


@dataclass(frozen=True, kw_only=True)
class Options:
    """``names`` are recipes, or paths of such; none: all that are shipped."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ()


def main(options: Options) -> int:
    """The number of recipes whose installation failed."""
    failed = 0
    for name in options.names or list_recipes():
        try:
            recipe = load_recipe(name)
            print(f"{Path(name).stem}: {install(recipe.install, INSTALLED / Path(name).stem)}", flush=True)
        except ForgejaxError as error:
            print(f"{name}: {error}", file=sys.stderr, flush=True)
            failed += 1
    return failed


def install(wanted: InstallConfig, folder: Path) -> str:
    """Installs packages into ``folder``; what became of it, in words. Raises ForgejaxError where it fails."""
    packages = (*wanted.npm, *wanted.pip)
    if not packages:
        return "nothing to install"
    npm = shutil.which("npm")
    if wanted.npm and npm is None:
        return f"left out: {', '.join(wanted.npm)} need Node.js, and there is no npm on PATH"
    stamp = folder / STAMP
    if stamp.is_file() and stamp.read_text(encoding="utf-8").split() == list(packages):
        return f"{', '.join(packages)} are there already"
    began = time.monotonic()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if wanted.pip:
        run(folder, sys.executable, "-m", "venv", str(folder))
        pip = ("-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off")
        run(folder, str(folder / "bin" / "python"), *pip, *wanted.pip)
    if wanted.npm and npm is not None:
        run(folder, npm, "install", "--prefix", str(folder), "--no-audit", "--no-fund", *wanted.npm)
    stamp.write_text("\n".join(packages), encoding="utf-8")
    return f"{', '.join(packages)} installed in {time.monotonic() - began:.0f} s"


def run(folder: Path, *command: str) -> None:
    """Runs one command, its output into the folder's log. Raises ForgejaxError with the end of it."""
    log = folder / LOG
    with log.open("a", encoding="utf-8") as output:
        try:
            status = subprocess.run(
                command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, timeout=INSTALL_S, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            status = None
    if status != 0:
        how = f"did not end within {INSTALL_S:g} s" if status is None else f"ended with status {status}"
        end = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        raise ForgejaxError(f"{command[0]} {how}; the end of {log}:\n{end}")


if __name__ == "__main__":
    sys.exit(min(1, main(tyro.cli(Options, description=__doc__))))
