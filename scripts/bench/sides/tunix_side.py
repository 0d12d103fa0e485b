"""The GRPO update of Tunix 0.1.7 on one batch, for ``train_step.py``: runs in an environment of its own.

Takes a folder with ``case.npz``. Each line on stdin is a command, each answer a line of JSON: ``gradient`` writes the
batch's gradient to ``gradient.npz`` there, ``update`` makes one update and tells its seconds.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.models.qwen3 import model as qwen3
from tunix.rl import common, rl_cluster
from tunix.rl.grpo import grpo_learner
from tunix.rl.rollout import base_rollout
from tunix.tests import test_common

_NEVER = 10**6  # more steps than are made
_PER_LAYER: dict[str, tuple[str, ...]] = {
    "attention_norm": ("input_layernorm", "w"),
    "q": ("attn", "q_proj", "w"),
    "k": ("attn", "k_proj", "w"),
    "v": ("attn", "v_proj", "w"),
    "o": ("attn", "o_proj", "w"),
    "q_norm": ("attn", "q_norm", "w"),
    "k_norm": ("attn", "k_norm", "w"),
    "mlp_norm": ("post_attention_layernorm", "w"),
    "gate": ("mlp", "gate_proj", "kernel"),
    "up": ("mlp", "up_proj", "kernel"),
    "down": ("mlp", "down_proj", "kernel"),
}
_WHOLE: dict[str, tuple[str, ...]] = {"embedding": ("embedder", "input_embedding"), "final_norm": ("final_norm", "w")}


def keep_gradient() -> optax.GradientTransformation:
    """Passes gradients on, and keeps the last."""

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return grads, grads

    return optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), update)


class Peer:
    """A Tunix learner whose policy has the given weights."""

    def __init__(
        self, config: Mapping[str, Any], weights: Mapping[str, np.ndarray], optimizer: Any, prompt: int
    ) -> None:
        self.mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
        with self.mesh:
            policy = make_policy(config, weights)
            role = rl_cluster.Role
            rollout = base_rollout.RolloutConfig(
                max_tokens_to_generate=8,
                max_prompt_length=prompt,
                kv_cache_size=prompt + 16,
                temperature=1.0,
                return_logprobs=True,
            )
            training = rl_cluster.RLTrainingConfig(
                actor_optimizer=optimizer, eval_every_n_steps=_NEVER, max_steps=_NEVER
            )
            cluster_config = rl_cluster.ClusterConfig(
                role_to_mesh={role.ACTOR: self.mesh, role.REFERENCE: self.mesh, role.ROLLOUT: self.mesh},
                rollout_engine="vanilla",
                training_config=training,
                rollout_config=rollout,
            )
            vocabulary = test_common.MockVocab(mapping_text_to_id={"<pad>": 0, "<s>": 1, "</s>": 2})
            engine = getattr(rl_cluster, "RLEngine", None) or rl_cluster.RLCluster
            self.cluster = engine(actor=policy, reference=None, tokenizer=vocabulary, cluster_config=cluster_config)
            argument = "rl_engine" if engine.__name__ == "RLEngine" else "rl_cluster"
            grpo = grpo_learner.GRPOConfig(num_generations=8, beta=0.0, loss_agg_mode="token-mean")
            self.learner = grpo_learner.GRPOLearner(
                reward_fns=lambda **_: [0.0], algo_config=grpo, **{argument: self.cluster}
            )

    def update(self, batch: common.TrainExample) -> float:
        """Seconds of one update."""
        with self.mesh:
            start = time.perf_counter()
            self.cluster.update_actor([batch], None, False)
            jax.block_until_ready(nnx.state(self.cluster.actor_trainer.model, nnx.Param))
            return time.perf_counter() - start

    def gradient(self, layers: int) -> dict[str, np.ndarray]:
        """What ``keep_gradient`` kept, under our names, layers stacked."""
        kept = self.cluster.actor_trainer.optimizer.opt_state[0]
        stacked: dict[str, list[np.ndarray]] = {}
        for path, name, _ in _places(layers):
            stacked.setdefault(name, []).append(np.asarray(_at(kept, path).get_value()))
        return {name: values[0] if name in _WHOLE else np.stack(values) for name, values in stacked.items()}


def read_case(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Configuration, weights and all else in ``case.npz``."""
    case = dict(np.load(folder / "case.npz"))
    config = json.loads(str(case.pop("config")))
    weights = {name.removeprefix("weight:"): case.pop(name) for name in list(case) if name.startswith("weight:")}
    return config, weights, case


def make_policy(config: Mapping[str, Any], weights: Mapping[str, np.ndarray]) -> qwen3.Qwen3:
    """Tunix's policy with these weights."""
    policy = qwen3.Qwen3(qwen3.ModelConfig(**config), rngs=nnx.Rngs(0))
    for path, name, layer in _places(config["num_layers"]):
        variable = _at(policy, path)
        value = weights[name] if layer is None else weights[name][layer]
        assert variable.get_value().shape == value.shape, (path, value.shape)
        variable.set_value(jnp.asarray(value))
    return policy


def _places(layers: int) -> Iterator[tuple[tuple[Any, ...], str, int | None]]:
    """Where Tunix keeps each weight, our name of it, and its layer."""
    for name, path in _WHOLE.items():
        yield path, name, None
    for layer in range(layers):
        for name, path in _PER_LAYER.items():
            yield ("layers", layer, *path), name, layer


def _at(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        tree = tree[key] if isinstance(key, int) or not hasattr(tree, str(key)) else getattr(tree, str(key))
    return tree


def main(folder: Path, replies: Any) -> None:
    config, weights, case = read_case(folder)
    fields = {name: jnp.asarray(value) for name, value in case.items()}
    batch = common.TrainExample(ref_per_token_logps=None, **fields)
    adamw = optax.adamw(1e-3)
    timed = Peer(config, weights, adamw, batch.prompt_ids.shape[1])
    for line in sys.stdin:
        if line.strip() == "gradient":
            peer = Peer(config, weights, optax.chain(keep_gradient(), adamw), batch.prompt_ids.shape[1])
            peer.update(batch)
            np.savez(folder / "gradient.npz", allow_pickle=False, **peer.gradient(config["num_layers"]))
            answer: dict[str, Any] = {}
        else:
            answer = {"seconds": timed.update(batch)}
        print(json.dumps(answer), file=replies, flush=True)


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    main(Path(sys.argv[1]), answers)
