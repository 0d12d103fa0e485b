"""What a process in a sandbox sees, reaches and may use: everything that it tries is contained, and said."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from aiohttp import web

from forgejax.environments.sandbox import Bubblewrap, Egress, Ran, SandboxConfig, make_bubblewrap
from forgejax.environments.scratch import remove_tree
from tests.environments.sandbox.machine import needs_sandboxes

pytestmark = needs_sandboxes

SMALL = SandboxConfig(processes=24, memory_mib=200, disk_mib=24, file_mib=8)


@pytest.fixture
def sandbox() -> Iterator[Bubblewrap]:
    made = make_bubblewrap(SMALL)
    yield made
    remove_tree(made.folder)
    assert not made.folder.exists()


def run(sandbox: Bubblewrap, script: str, deadline_s: float = 20.0) -> tuple[Ran, str]:
    output = sandbox.folder / "output"
    ran = sandbox.run(
        ["bash", "-c", script], deadline_s=deadline_s, output=output, show={}, environment={"OF": "the task"}
    )
    return ran, output.read_text()


def find_processes(words: str) -> list[str]:
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if words in file.read_bytes().replace(b"\0", b" ").decode():
                found.append(file.parent.name)
        except OSError:
            continue
    return found


def test_a_program_finds_the_system_its_own_folders_and_nothing_else(
    sandbox: Bubblewrap, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    (tmp_path / "of-another").write_text("secret")
    other = make_bubblewrap(SMALL)
    (other.work / "answer").write_text("secret")
    (sandbox.work / "given").write_text("here\n")
    sandbox.give(sandbox.work)
    ran, said = run(
        sandbox,
        f"pwd; cat given; echo $OF; env; cat {tmp_path}/of-another {other.work}/answer; ls {Path.cwd()} {Path.home()};"
        "echo done > made; cat made; python3 -c 'print(6*7)'; for at in /usr /etc /; do touch $at/x; done;"
        'test "$(ls /proc/1/root/ || ls /)" = "$(ls /)" && echo same',
    )
    remove_tree(other.folder)
    lines = said.splitlines()
    assert ran == Ran(status=0, exceeded=None)
    assert lines[:3] == ["/app", "here", "the task"] and {"done", "42", "same"} <= set(lines)
    assert "secret" not in said and "README.md" not in said and said.count("Read-only file system") == 3
    assert (sandbox.work / "made").read_text() == "done\n"


def test_nothing_is_reached_and_nobody_outside_is_signalled(sandbox: Bubblewrap) -> None:
    script = (
        "import os, socket\n"
        "for place in [('1.1.1.1', 53), ('127.0.0.1', 22), ('127.0.0.1', 8801)]:\n"
        "    try: socket.create_connection(place, 1); print('reached', place)\n"
        "    except OSError as error: print(type(error).__name__)\n"
        f"try: os.kill({os.getpid()}, 9); print('signalled')\n"
        "except ProcessLookupError: print('no such process')\n"
        "print(sorted(int(p) for p in os.listdir('/proc') if p.isdigit())[-1] < 20)\n"
    )
    (sandbox.work / "try.py").write_text(script)
    ran, said = run(sandbox, "python3 try.py; kill -9 -1 2> /dev/null; true")
    assert said.splitlines() == [
        "OSError",
        "ConnectionRefusedError",
        "ConnectionRefusedError",
        "no such process",
        "True",
    ]
    assert ran.exceeded is None


def test_processes_that_multiply_meet_the_limit_and_end_with_the_sandbox(sandbox: Bubblewrap) -> None:
    (sandbox.work / "multiply.py").write_text(
        "import subprocess\nfor i in range(60): subprocess.Popen(['sleep', '61.5'])\n"
    )
    ran, said = run(sandbox, "python3 multiply.py")
    assert ran.status == 1 and "BlockingIOError" in said
    (sandbox.work / "daemon.sh").write_text("setsid nohup sleep 62.5 > /dev/null 2>&1 &\n")
    assert run(sandbox, "bash daemon.sh; sleep 0.1; echo left")[1] == "left\n"
    assert find_processes("sleep 61.5") == find_processes("sleep 62.5") == []


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("for i in 1 2 3; do python3 -c 'x = bytearray(90 << 20); input()' < <(sleep 9) & done; wait", "of memory"),
        ("while true; do head -c 6M /dev/urandom > /tmp/$RANDOM; done", "to the disk"),
        ('for i in {10..17}; do eval "exec $i> x"; rm x; head -c 6M /dev/zero >&$i; done; sleep 9', "to the disk"),
    ],
)
def test_what_all_processes_hold_together_is_limited_and_said(sandbox: Bubblewrap, script: str, says: str) -> None:
    ran, _ = run(sandbox, script)
    assert ran.status is None and ran.exceeded is not None
    assert says in ran.exceeded and "raise tasks sandbox." in ran.exceeded


def test_memory_that_processes_share_counts_once(sandbox: Bubblewrap) -> None:
    (sandbox.work / "share.py").write_text(
        "import os, time\nheld = bytearray(60 << 20)\nfor _ in range(6): os.fork() or (time.sleep(0.8), os._exit(0))\n"
        "for _ in range(6): os.wait()\n"
    )
    assert run(sandbox, "python3 share.py")[0] == Ran(status=0, exceeded=None)


def test_one_process_or_file_alone_meets_a_limit_of_its_own(sandbox: Bubblewrap) -> None:
    ran, said = run(sandbox, "python3 -c 'bytearray(300 << 20)'; head -c 20M /dev/zero > big; ls -s --block-size=M big")
    assert "MemoryError" in said and "File too large" in said and "8M big" in said and ran.exceeded is None


def test_a_passed_deadline_ends_all_of_it(sandbox: Bubblewrap) -> None:
    began = time.monotonic()
    ran, _ = run(sandbox, "trap '' TERM; sleep 63.5 & sleep 64.5", deadline_s=0.5)
    assert ran == Ran(status=None, exceeded=None) and time.monotonic() - began < 10.0
    assert find_processes("sleep 63.5") == find_processes("sleep 64.5") == []


async def test_the_outlet_is_reached_from_inside_and_no_other_port_and_by_nobody_later(sandbox: Bubblewrap) -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(text=f"{request.path} {len(await request.read())}")

    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    port = runner.addresses[0][1]
    egress = Egress.of(f"http://127.0.0.1:{port}/v1")
    (sandbox.work / "ask.py").write_text(
        "import urllib.request as u\n"
        f"print([u.urlopen('http://127.0.0.1:{port}/v1/' + str(i), b'x' * 300_000).read() for i in range(3)])\n"
        f"try: u.urlopen('http://127.0.0.1:{port + 1}/')\n"
        "except OSError: print('refused')\n"
    )
    async with sandbox.enter(egress=egress, read=[], own=[]) as entered:
        process = await asyncio.create_subprocess_exec(
            *entered.word([sys.executable, "ask.py"]), stdout=asyncio.subprocess.PIPE
        )
        said, _ = await asyncio.wait_for(process.communicate(), 30)
    await runner.cleanup()
    assert said.decode().splitlines() == [
        str([f"/v1/{i} 300000".encode() for i in range(3)]),
        "refused",
    ]
    assert entered.exceeded is None and not (sandbox.folder / "door").exists()
