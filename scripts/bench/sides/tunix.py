"""The peer's side of a comparison: its own environment, made on demand, and a process that answers line by line."""

from __future__ import annotations

import json
import select
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import mkdtemp
from types import TracebackType
from typing import Any

import jax
import numpy as np
from sides.environments import find_python

from forgejax.learner import Sample
from forgejax.models import PolicyConfig

TUNIX = "google-tunix==0.1.7"
_ANSWER_S = 900


class TunixPeer:
    """The Tunix update of the same samples and weights; a context manager, for it is a process of its own.

    Raises SystemExit with a sentence where it cannot be installed, or fails.
    """

    def __init__(self, policy: PolicyConfig, params: Any, samples: Sequence[Sample]) -> None:
        if policy.qk_norm != "head" or not policy.tied_embeddings:
            raise SystemExit("--peer tunix needs a policy of Qwen3's form: choose --model tiny or --model 20m")
        python = find_python("tunix", [TUNIX, f"jax=={jax.__version__}"])
        self._folder = Path(mkdtemp(prefix="tunix-"))
        np.savez(self._folder / "case.npz", allow_pickle=False, **_case(policy, params, samples))
        self._log = (self._folder / "log.txt").open("wb")
        side = str(Path(__file__).with_name("tunix_side.py"))
        self._process = subprocess.Popen(
            [python, side, str(self._folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log
        )

    def __enter__(self) -> TunixPeer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()
        shutil.rmtree(self._folder)

    def gradient(self) -> dict[str, np.ndarray]:
        """The gradient of the batch, by the names of our weights."""
        self._ask("gradient")
        return dict(np.load(self._folder / "gradient.npz"))

    def update(self) -> float:
        """Seconds of one update, as the peer's own process measures them; the first compiles."""
        return float(self._ask("update")["seconds"])

    def _ask(self, command: str) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        line = b""
        try:
            self._process.stdin.write(f"{command}\n".encode())
            self._process.stdin.flush()
            if select.select([self._process.stdout], [], [], _ANSWER_S)[0]:
                line = self._process.stdout.readline()
        except BrokenPipeError:
            pass  # it has died: its log says why
        if not line:
            said = (self._folder / "log.txt").read_text(errors="replace")
            raise SystemExit(
                f"the peer gave no answer to {command!r} within {_ANSWER_S} s; its last lines:\n{said[-2000:]}"
            )
        answer: dict[str, Any] = json.loads(line)
        return answer


def _case(policy: PolicyConfig, params: Any, samples: Sequence[Sample]) -> dict[str, Any]:
    """The batch as the peer takes it: prompts padded on the left and completions on the right, with token 0."""
    prompt = max(len(sample.context_ids) for sample in samples)
    answer = max(len(sample.token_ids) for sample in samples)
    prompt_ids = np.zeros((len(samples), prompt), np.int32)
    completion_ids = np.zeros((len(samples), answer), np.int32)
    old = np.zeros((len(samples), answer), np.float32)
    for row, sample in enumerate(samples):
        prompt_ids[row, prompt - len(sample.context_ids) :] = sample.context_ids
        completion_ids[row, : len(sample.token_ids)] = sample.token_ids
        old[row, : len(sample.token_ids)] = sample.old_logp
    return {
        **describe_policy(policy, params),
        "prompt_ids": prompt_ids,
        "prompt_mask": (prompt_ids > 0).astype(np.int32),
        "completion_ids": completion_ids,
        "completion_mask": (completion_ids > 0).astype(np.int32),
        "advantages": np.array([sample.advantage for sample in samples], np.float32),
        "old_per_token_logps": old,
    }


def describe_policy(policy: PolicyConfig, params: Any) -> dict[str, Any]:
    """The policy as the peer's side reads it: its configuration, as JSON, and its weights."""
    config = {
        "num_layers": policy.num_layers,
        "vocab_size": policy.vocab_size,
        "embed_dim": policy.d_model,
        "hidden_dim": policy.d_ff,
        "num_heads": policy.num_heads,
        "head_dim": policy.head_size,
        "num_kv_heads": policy.num_kv_heads,
        "rope_theta": int(policy.rope.theta),
        "norm_eps": policy.norm_eps,
        "use_tied_embedding": True,
    }
    weights = {f"weight:{name}": value for name, value in named_weights(params).items()}
    return {"config": json.dumps(config), **weights}


def named_weights(params: Any) -> Mapping[str, np.ndarray]:
    """Every array of a tree of weights, or of their gradients, by the name of its weight."""
    leaves, _ = jax.tree.flatten_with_path(params)
    return {_name(path): np.asarray(leaf) for path, leaf in leaves}


def _name(path: tuple[Any, ...]) -> str:
    names = [str(entry.key) for entry in path if isinstance(entry, jax.tree_util.DictKey)]
    return names[-1]
