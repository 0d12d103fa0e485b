"""Laws of the door to JetStream."""

from __future__ import annotations

import logging
import subprocess
import sys


def test_importing_jetstream_leaves_no_stub_no_tensorflow_and_the_root_logger_as_it_was() -> None:
    script = (
        "import warnings, logging, sys; warnings.simplefilter('error'); import orbax.checkpoint; "
        "logging.getLogger().setLevel(logging.ERROR); handlers = list(logging.getLogger().handlers); "
        "import forgejax.rollout; root = logging.getLogger(); "
        "assert root.level == logging.ERROR and root.handlers == handlers; "
        "bad = [name for name in sys.modules if name.split('.')[0] in ('tensorflow', 'seqio')]; assert not bad, bad"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert logging.getLogger().level != logging.DEBUG
