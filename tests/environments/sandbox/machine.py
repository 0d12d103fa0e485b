"""Whether this machine has sandboxes: a container without the capabilities for them has none, and says so."""

from __future__ import annotations

import pytest

from forgejax.environments.sandbox import SandboxConfig, probe_bubblewrap
from forgejax.errors import ConfigError


def _find_lack() -> str:
    try:
        probe_bubblewrap(SandboxConfig())
    except ConfigError as error:
        return str(error)
    return ""


_LACK = _find_lack()
needs_sandboxes = pytest.mark.skipif(bool(_LACK), reason=_LACK)
