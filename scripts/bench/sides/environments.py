"""Environments of the peers that are measured, each made once, below ``.cache``."""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[3]
_INSTALL_S = 1800


def find_python(name: str, packages: Sequence[str]) -> str:
    """The Python that has these packages installed. Raises SystemExit where they cannot be."""
    place = _ROOT / ".cache" / f"bench-{name}"
    python, stamp = place / "bin" / "python", place / ".complete"
    if not stamp.exists():
        print(f"installing {', '.join(packages)} into {place}, some minutes ...", file=sys.stderr)
        shutil.rmtree(place, ignore_errors=True)
        venv.create(place, with_pip=True)
        try:
            subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages], check=True, timeout=_INSTALL_S)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            raise SystemExit(f"{', '.join(packages)} could not be installed: {error}") from error
        stamp.touch()
    return str(python)
