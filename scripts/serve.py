"""Serves a policy, token ids in and token ids out, over HTTP and over JetStream's gRPC service; ``--help`` says how."""

from __future__ import annotations

import sys

from forgejax.run.serving.program import run_server

if __name__ == "__main__":
    sys.exit(run_server())
