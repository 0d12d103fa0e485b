"""What a session's own keys and values of older weights save and cost (``engine.reuse``), where contexts are long.

Sessions that share a long system prompt take turns: some observed tokens, some sampled ones; new weights come every so
many turns, each a random step away from the last. Every sampled token is scored by one forward pass of the weights that
drew it over its whole context, as a trainer would: what differs is the age of keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from _harness import show
from flax import nnx

from forgejax.learner.gap import GapFigures
from forgejax.models import Policy, PolicyConfig, init_params
from forgejax.rollout import Driver, EngineConfig, PolicyEngine
from forgejax.types import Completion, SampleRequest

_POLICY = PolicyConfig(vocab_size=512, num_layers=4, d_model=128, num_heads=4, num_kv_heads=2, d_ff=384)


@dataclass(frozen=True, kw_only=True)
class Options:
    """The agents and the weights. ``drift`` is the size of an update over that of each weight."""

    ages: tuple[int, ...] = (0, 1, 2, 4, 8)  # max_kv_age; 0 is reuse "version"
    sessions: int = 4
    turns: int = 16
    shared: int = 1024  # tokens of the system prompt
    observed: int = 60
    sampled: int = 40
    turns_per_version: int = 2
    drift: tuple[float, ...] = (0.003, 0.01, 0.03)
    json: bool = False

    @property
    def context(self) -> int:
        return self.shared + self.turns * (self.observed + self.sampled)


def make_versions(options: Options, drift: float) -> list[Any]:
    """The weights of every version, each a random step from the one before."""
    versions = [init_params(_POLICY)]
    for version in range(1, -(-options.turns // options.turns_per_version)):
        leaves, tree = jax.tree.flatten(versions[-1])
        keys = jax.random.split(jax.random.key(version), len(leaves))
        stepped = [
            x + drift * jnp.sqrt(jnp.mean(x**2)) * jax.random.normal(key, x.shape)
            for x, key in zip(leaves, keys, strict=True)
        ]
        versions.append(jax.tree.unflatten(tree, stepped))
    return versions


def play(options: Options, versions: Sequence[Any], age: int) -> tuple[list[Completion], Driver]:
    """Every turn of every session."""
    config = EngineConfig(
        slots=options.sessions,
        max_context=options.context,
        reuse="session" if age else "version",
        max_kv_age=max(age, 1),
    )
    rng, done = np.random.default_rng(0), list[Completion]()
    system = rng.integers(0, _POLICY.vocab_size, options.shared)
    texts = [system] * options.sessions
    with Driver(PolicyEngine(_POLICY, config), versions[0]) as driver:
        for turn in range(options.turns):
            version, rest = divmod(turn, options.turns_per_version)
            if version and not rest:
                driver.publish(versions[version], version)
            texts = [np.concatenate([text, rng.integers(0, _POLICY.vocab_size, options.observed)]) for text in texts]
            futures = [
                driver.submit(
                    SampleRequest(
                        request_id=f"{session}-{turn}",
                        session_id=str(session),
                        prompt_ids=text.astype(np.int32),
                        max_tokens=options.sampled,
                        seed=turn * options.sessions + session,
                    )
                )
                for session, text in enumerate(texts)
            ]
            said = [future.result() for future in futures]
            texts = [np.concatenate([text, each.token_ids]) for text, each in zip(texts, said, strict=True)]
            done += said
    return done, driver


def make_scorer(context: int) -> Any:
    """Log-probs of a completion's tokens under some weights, from one forward pass over all of its context."""
    graphdef = nnx.split(nnx.eval_shape(lambda: Policy(_POLICY, nnx.Rngs(0))))[0]
    causal = jnp.tril(jnp.ones((context, context), bool))

    def attend(_: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, memory: None) -> tuple[jax.Array, None]:
        k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
        scores = jnp.einsum("BTHC,BSHC->BHTS", q, k) * q.shape[-1] ** -0.5
        weights = jax.nn.softmax(jnp.where(causal[None, None], scores, -jnp.inf), axis=-1)
        return jnp.einsum("BHTS,BSHC->BTHC", weights, v), memory

    @jax.jit
    def score(params: Any, ids_T: jax.Array) -> jax.Array:
        policy = nnx.merge(graphdef, params)
        hidden, _ = policy(ids_T[None], jnp.arange(context)[None], attend, None)
        logp_TV = jax.nn.log_softmax(policy.logits(hidden)[0], axis=-1)
        return jnp.take_along_axis(logp_TV[:-1], ids_T[1:, None], axis=1)[:, 0]

    def score_completion(params: Any, each: Completion) -> np.ndarray:
        ids = np.concatenate([each.prompt_ids, each.token_ids])
        padded = np.zeros(context, np.int32)
        padded[: len(ids)] = ids
        return np.asarray(score(params, padded))[len(each.prompt_ids) - 1 : len(ids) - 1]

    return score_completion


def main(options: Options) -> None:
    score, result = make_scorer(options.context), dict[str, Any]()
    for drift in options.drift:
        versions = make_versions(options, drift)
        for age in options.ages:
            done, driver = play(options, versions, age)
            carried, step = GapFigures(), GapFigures()
            for each in done:
                version = int(each.versions[-1])
                scored = score(versions[version], each)
                if each.oldest_versions[0] < version:
                    carried.add(scored - each.logprobs)
                if not age and version + 1 < len(versions):
                    step.add(score(versions[version + 1], each) - scored)
            metrics, name = driver.metrics(), f"drift {drift:g}, age {age}"
            result |= {
                f"{name}: computed a version": metrics.computed_tokens / len(versions),
                f"{name}: busy seconds": metrics.busy_s,
                f"{name}: carried tokens' share": carried.tokens / sum(len(each.token_ids) for each in done),
                f"{name}: their gap": carried.mean,
                f"{name}: its p99": carried.p99,
                f"{name}: their ess": carried.ess,
            }
            if not age:
                result[f"drift {drift:g}: gap of one update"] = step.mean
    show(result, options.json)


if __name__ == "__main__":
    main(tyro.cli(Options))
