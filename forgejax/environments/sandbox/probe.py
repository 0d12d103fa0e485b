"""Whether this machine has sandboxes, and what it lacks where it has none."""

from __future__ import annotations

import os
import re
from pathlib import Path

from forgejax.environments.sandbox.bubblewrap import make_bubblewrap
from forgejax.environments.sandbox.config import SandboxConfig
from forgejax.environments.scratch import remove_tree
from forgejax.errors import ConfigError

_PROBE_S = 20.0
_CAPABILITIES = {  # by their bits: what root needs, to make a sandbox, to give it files, to look into it and to end it
    "CHOWN": 0,
    "DAC_OVERRIDE": 1,
    "FOWNER": 3,
    "KILL": 5,
    "SETGID": 6,
    "SETUID": 7,
    "NET_ADMIN": 12,
    "SYS_PTRACE": 19,
    "SYS_ADMIN": 21,
}
_OTHERWISE = 'or set tasks.sandbox.kind = "none" for agents that you trust with all that this process may do'
_DOCKER = (
    "Docker: docker run --cap-add SYS_ADMIN --cap-add NET_ADMIN --cap-add SYS_PTRACE "
    "--security-opt seccomp=unconfined --security-opt apparmor=unconfined"
)


def probe_bubblewrap(config: SandboxConfig) -> None:
    """Raises ConfigError, with what this machine lacks and what to do, where no sandbox can be entered."""
    if os.geteuid() == 0 and (lacking := list_lacking()):
        raise ConfigError(
            f"no sandbox can be made: this process is root without the capabilities {', '.join(lacking)}; give it "
            f"those ({_DOCKER}), run it as another user, {_OTHERWISE}"
        )
    sandbox = make_bubblewrap(config)
    try:
        output = sandbox.folder / "said"
        ran = sandbox.run(["sh", "-c", "true | true"], deadline_s=_PROBE_S, output=output, show={}, environment={})
        if ran.status != 0:
            said = output.read_text(encoding="utf-8", errors="replace").strip() or f"status {ran.status}"
            raise ConfigError(f"no sandbox can be entered on this machine: {said}; {_advise(said)}, {_OTHERWISE}")
    finally:
        remove_tree(sandbox.folder)


def list_lacking() -> list[str]:
    """Capabilities that root needs and this process has not."""
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    found = re.search(r"^CapEff:\s*([0-9a-f]+)$", status, re.MULTILINE)
    held = int(found[1], 16) if found else 0
    return [name for name, bit in _CAPABILITIES.items() if not held >> bit & 1]


def _advise(said: str) -> str:
    """What to do about what bubblewrap said."""
    if os.geteuid() == 0:
        return f"root must be allowed namespaces and mounts ({_DOCKER})"
    if "uid map" in said or "namespace" in said:
        return (
            "users must be allowed namespaces (sysctl kernel.unprivileged_userns_clone=1, "
            "kernel.apparmor_restrict_unprivileged_userns=0, user.max_user_namespaces above 0)"
        )
    return "see what bubblewrap says"
