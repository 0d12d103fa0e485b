"""Serves a policy, token ids in and token ids out, over HTTP and over JetStream's gRPC service; ``--help`` says how."""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    # Where train.py keeps its compiled programs. jax reads this when it is imported, which takes seconds.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", ".cache/jax")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    from forgejax.run.serving.program import run_server

    sys.exit(run_server())
