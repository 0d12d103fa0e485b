"""Samplers of others on a workload of ``rollout.py``: a process each, with the same weights, prompts and lengths."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import mkdtemp
from types import TracebackType
from typing import Any, Literal

import jax
import numpy as np
from _rollout_cases import Workload
from sides.environments import find_python
from sides.process import SideProcess
from sides.tunix import TUNIX, describe_policy

from forgejax.models import PolicyConfig, export_policy
from forgejax.types import TokenIds

PeerName = Literal["tunix", "transformers"]
_ANSWER_S = 900.0
_TRANSFORMERS = ("torch==2.13.0", "transformers==5.23.0")


class RolloutPeer:
    """One of them; a context manager. Raises SystemExit with a sentence where it cannot be installed, or fails."""

    def __init__(self, name: PeerName, python: str, policy: PolicyConfig, params: Any, workload: Workload) -> None:
        """``python``: the interpreter that has it; "" makes an environment of its own."""
        if name == "tunix" and (policy.qk_norm != "head" or not policy.tied_embeddings):
            raise SystemExit("--peer tunix needs a policy of Qwen3's form: choose --model tiny or --model 20m")
        packages = [TUNIX, f"jax=={jax.__version__}"] if name == "tunix" else _TRANSFORMERS
        python = python or find_python(name, packages)
        self._folder = Path(mkdtemp(prefix=f"{name}-"))
        if name == "tunix":
            np.savez(self._folder / "case.npz", allow_pickle=False, **describe_policy(policy, params))
        else:
            export_policy(policy, params, self._folder / "model", None)
        sessions = [
            [{"observed": turn.observed.tolist(), "drawn": turn.drawn} for turn in session]
            for session in workload.sessions
        ]
        text = json.dumps({"sessions": sessions, "rounds": workload.rounds(), "context": workload.context})
        (self._folder / "workload.json").write_text(text, encoding="utf-8")
        command = [python, "-m", f"sides.rollout_{name}", str(self._folder)]
        self._process = SideProcess(command, _ANSWER_S, folder=Path(__file__).parents[1])

    def __enter__(self) -> RolloutPeer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.__exit__(kind, error, trace)
        shutil.rmtree(self._folder)

    def play(self) -> float:
        """Seconds of the whole workload, as the peer's own process measures them."""
        return float(self._process.ask({"do": "play"})["seconds"])

    def score(self, ids: TokenIds) -> Sequence[float]:
        """The log-probabilities that the peer's policy gives all ids but the first."""
        answer: list[float] = self._process.ask({"do": "score", "ids": ids.tolist()})["logprobs"]
        return answer
