"""What of an agent's program is shown in its sandbox, and what it may use there."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from forgejax.agents import AgentConfig, ProcessScaffold
from forgejax.agents.scaffolds.confined import list_program
from forgejax.environments import Workspace
from forgejax.environments.sandbox import SandboxConfig, make_bubblewrap
from forgejax.environments.scratch import remove_tree
from tests.agents.fakes import make_episode
from tests.environments.sandbox.machine import needs_sandboxes


def test_files_that_the_configuration_names_are_shown_and_nobodys_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, tool = tmp_path / "home", tmp_path / "tool"
    for folder in (home, tool):
        folder.mkdir()
    monkeypatch.setenv("HOME", str(home))
    (home / "settings").write_text("")
    env = {"HOME": str(home), "TMPDIR": "/tmp", "ROOT": "/", "TOOLS": f"{tool}:/usr/bin", "SET": f"{home}/settings"}
    config = AgentConfig(kind="process", command=("sh", "-c", "true"), env=env)
    assert {tool, home / "settings"} == set(list_program(config)) - {Path("/usr"), *Path("/bin/sh").parents}


@needs_sandboxes
async def test_what_an_agent_writes_to_its_home_counts_and_what_it_connects_to_is_bounded() -> None:
    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        reached.append(writer.get_extra_info("peername"))
        writer.write(b"!")
        await reader.read()
        writer.close()

    reached: list[object] = []
    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    script = (
        "import os, socket, sys, time\n"
        "def ask():\n"
        f"    held.append(socket.create_connection(('127.0.0.1', {port})))\n"
        "    try: return held[-1].recv(1)\n"
        "    except OSError: return b''\n"
        "held = []\n"
        "assert [ask() for _ in range(100)].count(b'!') == 64\n"
        "for n in range(30): open(f'{sys.argv[1]}/{n}', 'wb').write(bytes(2 << 20))\n"
        "time.sleep(60)\n"
    )
    command = (sys.executable, "-I", "-S", "-c", script, "{home}")
    config = AgentConfig(kind="process", command=command, deadline_s=20.0)
    sandbox = make_bubblewrap(SandboxConfig(disk_mib=16, file_mib=4))
    workspace = Workspace(directory=sandbox.work, sandbox=sandbox)
    episode = replace(make_episode(), base_url=f"http://127.0.0.1:{port}/v1", workspace=workspace, deadline_s=20.0)
    scaffold = ProcessScaffold(config)
    await scaffold.start()
    try:
        result = await scaffold.run(episode)
    finally:
        await scaffold.close()
        server.close()
        remove_tree(sandbox.folder)
    assert (
        result.error is not None
        and "MiB to the disk and was ended; raise tasks sandbox.disk_mib from 16" in result.error
    )
    assert len(reached) == 64
