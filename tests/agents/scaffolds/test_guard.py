"""Agents never outlive their trainer."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from forgejax.agents.scaffolds.guard import MARKER_NAME, marked_processes
from forgejax.agents.scaffolds.keeper import find_descendants
from tests.agents.fakes import is_running


def parent_of(process_id: int) -> int:
    return int(Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[1])


TRAINER = """
import asyncio, sys, threading
from forgejax.agents import AgentConfig, EpisodeSpec, ProcessScaffold

AGENT = '''
import os, subprocess, sys, time
SLEEP = [sys.executable, "-I", "-S", "-c", "import time; time.sleep(60)"]
subprocess.Popen(SLEEP, start_new_session=True)
subprocess.Popen(SLEEP, start_new_session=True, env={})
open(sys.argv[1], "w").write(str(os.getpid()))
time.sleep(60)
'''

async def main():
    scaffold = ProcessScaffold(AgentConfig(kind="process", command=(sys.executable, "-I", "-S", "-c", AGENT)))
    await scaffold.start()
    place = {"base_url": "u", "api_key": "k", "model": "policy", "context_length": 4096}
    episode = EpisodeSpec(id="e", question=sys.argv[1], deadline_s=60.0, **place)
    await scaffold.run(episode)

thread = threading.Thread(target=lambda: asyncio.run(main()))
thread.start()
thread.join()
"""


def marked_with(agent: int) -> list[int]:
    """The processes that share the agent's marker, read before the trainer dies."""
    environ = Path(f"/proc/{agent}/environ").read_bytes().split(b"\0")
    marker = next(entry for entry in environ if entry.startswith(MARKER_NAME.encode())).decode().partition("=")[2]
    return marked_processes(marker)


@pytest.mark.parametrize("killed", [("trainer",), ("trainer", "guard"), ("guard", "trainer"), ("trainer", "keeper")])
def test_agents_and_their_detached_children_die_with_a_trainer_killed_by_force(
    tmp_path: Path, killed: tuple[str, ...]
) -> None:
    started = tmp_path / "agent"
    trainer = subprocess.Popen([sys.executable, "-c", TRAINER, str(started)])
    try:
        deadline = time.monotonic() + 20.0
        while not (started.exists() and started.read_text()):
            assert time.monotonic() < deadline, "the agent did not start"
            time.sleep(0.05)
        agent = int(started.read_text())
        below = find_descendants(trainer.pid)
        ids = {"trainer": trainer.pid, "keeper": parent_of(agent)}
        ids["guard"] = next(each for each in below if "guard.py" in Path(f"/proc/{each}/cmdline").read_text())
        marked = marked_with(agent)
        agents = marked if "keeper" in killed else [each for each in below if each not in ids.values()]
        assert (len(marked), len(agents)) == (3, 3)  # of the marked, one is the keeper; of the agents, none
    finally:
        for name in killed:
            os.kill(ids[name], signal.SIGKILL)
        trainer.wait()
    deadline = time.monotonic() + 10.0
    while any(is_running(agent) for agent in agents):
        assert time.monotonic() < deadline, f"of {agents} some live on"
        time.sleep(0.05)
