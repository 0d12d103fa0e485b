"""One sound run that every test of it looks at."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from forgejax.run import rundir
from forgejax.run.conclude import conclude
from tests.run.tiny_run import Ended, compiled_once, play

__all__ = ["compiled_once"]


@pytest.fixture(scope="package")
def ended(tmp_path_factory: pytest.TempPathFactory, compiled_once: Path) -> Iterator[Ended]:
    """Three steps on two devices, with the port it was told to take taken by somebody else; concluded."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = play(tmp_path_factory.mktemp("runs"), "--run.steps=3", f"--gateway.port={port}")
        place = rundir.reopen(ended.path.parent, ended.path.name)
        conclude(ended.outcome, ended.config, place, "python scripts/train.py")
        place.close()
        yield ended
