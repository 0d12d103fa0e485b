"""What the kernel refuses programs in a sandbox."""

from __future__ import annotations

import platform
import struct

import pytest

from forgejax.environments.sandbox import SandboxConfig, make_bubblewrap
from forgejax.environments.sandbox.syscalls import make_filter
from forgejax.environments.scratch import remove_tree
from forgejax.errors import ConfigError
from tests.environments.sandbox.machine import needs_sandboxes

_TRIED = """
import ctypes, errno, os, socket, subprocess, threading
libc = ctypes.CDLL(None, use_errno=True)

def call(name, *arguments):
    print(name, "done" if getattr(libc, name)(*arguments) != -1 else errno.errorcode[ctypes.get_errno()])

call("unshare", 0x10000000)
call("unshare", 0x400)  # the files that are open: no namespace
call("shmget", 0, ctypes.c_size_t(1 << 20), 0o1600)
call("shmget", 0, ctypes.c_size_t(1 << 33), 0o1600)
call("shmget", 0, ctypes.c_size_t(4096), 0o1600)
call("msgget", 0, 0o1600)
call("memfd_create", b"x", 0)
families = []
for family in range(1, 46):
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        try:
            socket.socket(family, kind).close()
            families.append(family)
            break
        except OSError:
            continue
print(families)
thread = threading.Thread(target=print, args=("thread",))
thread.start()
thread.join()
print(subprocess.run(["echo", "child"], capture_output=True, text=True).stdout.strip(), os.wait4(os.posix_spawn(
    "/bin/true", ["true"], {}), 0)[1])
"""


@needs_sandboxes
def test_there_are_no_namespaces_inside_no_memory_beside_processes_and_files_and_no_sockets_that_lead_out() -> None:
    sandbox = make_bubblewrap(SandboxConfig())
    (sandbox.work / "try.py").write_text(_TRIED)
    output = sandbox.folder / "said"
    sandbox.run(["python3", "try.py"], deadline_s=20.0, output=output, show={}, environment={})
    said = output.read_text().splitlines()
    remove_tree(sandbox.folder)
    assert said == [
        "unshare EPERM",
        "unshare done",
        "shmget EINVAL",
        "shmget EINVAL",
        "shmget done",
        "msgget ENOSYS",
        "memfd_create ENOSYS",
        "[1, 2, 10, 16]",
        "thread",
        "child 0",
    ]


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_every_jump_of_a_filter_ends_within_it(monkeypatch: pytest.MonkeyPatch, machine: str) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    program = list(struct.iter_unpack("<HBBI", make_filter()))
    for place, (operation, yes, no, _) in enumerate(program):
        assert operation != 0x06 or (yes, no) == (0, 0)
        assert place + max(yes, no) + 1 < len(program) or place == len(program) - 1
    assert program[-1] == (0x06, 0, 0, 0x7FFF0000)


def test_a_machine_of_an_unknown_kind_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(ConfigError, match="kinds x86_64, aarch64, and this is riscv64"):
        make_filter()
