"""Laws of the device programs over any ``KVMemory``: here one with the plainest attention there is."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from forgejax.models import Attend
from forgejax.rollout.engine.kv.base import KVMemory, PrefilledSequence
from forgejax.rollout.engine.kv.rows import make_rows
from forgejax.rollout.engine.programs import Programs
from forgejax.rollout.engine.settings import SlotSettings
from tests.rollout import tiny


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PlainMemory:
    """Keys and values as [layers, sequences, tokens, heads, size]; one softmax over all of them."""

    k: jax.Array
    v: jax.Array

    def attend(self, positions_BQ: jax.Array, length: jax.Array) -> Attend:
        def attend(
            layer: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, memory: PlainMemory
        ) -> tuple[jax.Array, PlainMemory]:
            B, _, H, C = q.shape
            place = (layer, jnp.arange(B)[:, None], positions_BQ)
            memory = PlainMemory(k=memory.k.at[place].set(k), v=memory.v.at[place].set(v))
            keys, values = (jnp.repeat(x[layer, :B], H // k.shape[2], axis=2) for x in (memory.k, memory.v))
            seen_BQT = jnp.arange(keys.shape[1])[None, None, :] <= positions_BQ[:, :, None]
            score_BHQT = jnp.where(seen_BQT[:, None], jnp.einsum("BQHC,BTHC->BHQT", q, keys) * C**-0.5, -jnp.inf)
            return jnp.einsum("BHQT,BTHC->BQHC", jax.nn.softmax(score_BHQT), values), memory

        return attend

    def insert(self, one: PlainMemory, index: jax.Array) -> PlainMemory:
        return jax.tree.map(lambda every, single: every.at[:, index].set(single[:, 0]), self, one)


def _make_plain(sequences: int) -> PlainMemory:
    k, v = (jnp.zeros((2, sequences, 64, 2, 4)) for _ in "kv")
    return PlainMemory(k=k, v=v)


def _draw(one: KVMemory, every: KVMemory) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and log-probs [steps, k] of a prompt of 13 tokens, fed in two chunks and decoded in slot 2 of 4."""
    programs, params, ids = Programs(policy=tiny.POLICY, tokens_per_step=2), tiny.params(), tiny.prompt(5, 13)
    sequence = PrefilledSequence(kv=one, length=jnp.int32(0), last=jnp.int32(ids[0]))
    for start, count in ((1, 8), (9, 4)):
        chunk = np.pad(ids[start : start + count], (0, 8 - count))
        sequence = programs.extend(params, sequence, jnp.asarray(chunk), np.int32(count))
    assert (int(sequence.length), int(sequence.last)) == (12, ids[-1])
    state = dataclasses.replace(tiny.engine().init_decode_state(), kv=every)
    state = dataclasses.replace(state, slots=jax.device_put(state.slots, jax.devices()[0]))
    settings = SlotSettings(budget=20, seed=3)
    state = programs.insert(sequence, state, np.int32(2), settings.to_arrays(8))
    rows = []
    for _ in range(4):
        state, data = programs.generate(4, params, state, np.int32(0))
        rows.append(np.asarray(data)[2])
    drawn = np.stack(rows)
    return drawn[:, :2], drawn[:, 5:7].copy().view(np.float32)


def test_the_programs_draw_the_same_over_rows_and_over_another_memory() -> None:
    tokens, logprobs = _draw(make_rows(tiny.POLICY, 1, 64), make_rows(tiny.POLICY, 4, 64))
    other_tokens, other_logprobs = _draw(_make_plain(1), _make_plain(4))
    np.testing.assert_array_equal(tokens, other_tokens)
    np.testing.assert_allclose(logprobs, other_logprobs, atol=1e-5)
    expected = tiny.dense_logprobs(tiny.params(), tiny.prompt(5, 13), tokens.ravel(), SlotSettings(budget=1).law)
    np.testing.assert_allclose(logprobs.ravel(), expected, atol=1e-5)
