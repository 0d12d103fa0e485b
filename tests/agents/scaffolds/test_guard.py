"""Agents never outlive their trainer."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from forgejax.agents.scaffolds.guard import MARKER_NAME, marked_processes
from tests.agents.fakes import is_running

TRAINER = """
import asyncio, sys, threading
from forgejax.agents import AgentConfig, EpisodeSpec, ProcessScaffold

AGENT = '''
import os, subprocess, sys, time
subprocess.Popen([sys.executable, "-I", "-S", "-c", "import time; time.sleep(60)"], start_new_session=True)
open(sys.argv[1], "w").write(str(os.getpid()))
time.sleep(60)
'''

async def main():
    scaffold = ProcessScaffold(AgentConfig(kind="process", command=(sys.executable, "-I", "-S", "-c", AGENT)))
    await scaffold.start()
    episode = EpisodeSpec(id="e", question=sys.argv[1], base_url="u", api_key="k", deadline_s=60.0)
    await scaffold.run(episode)

thread = threading.Thread(target=lambda: asyncio.run(main()))
thread.start()
thread.join()
"""


def agents_of(agent: int) -> list[int]:
    """The processes that share the agent's marker, read before the trainer dies."""
    environ = Path(f"/proc/{agent}/environ").read_bytes().split(b"\0")
    marker = next(entry for entry in environ if entry.startswith(MARKER_NAME.encode())).decode().partition("=")[2]
    return marked_processes(marker)


def test_agents_and_their_detached_children_die_with_a_trainer_killed_by_force(tmp_path: Path) -> None:
    started = tmp_path / "agent"
    trainer = subprocess.Popen([sys.executable, "-c", TRAINER, str(started)])
    try:
        deadline = time.monotonic() + 20.0
        while not (started.exists() and started.read_text()):
            assert time.monotonic() < deadline, "the agent did not start"
            time.sleep(0.05)
        agents = agents_of(int(started.read_text()))
        assert len(agents) == 2
    finally:
        os.kill(trainer.pid, signal.SIGKILL)
        trainer.wait()
    deadline = time.monotonic() + 10.0
    while any(is_running(agent) for agent in agents):
        assert time.monotonic() < deadline, f"of {agents} some live on"
        time.sleep(0.05)
