"""The engine's device programs and the pytrees they work on.

The programs depend on the policy's shape and on the number of tokens per step alone, so that equal engines share what
is compiled. Dimension key: S slots, N stop ids, k tokens per step, T tokens of a prefill chunk.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from forgejax.models import Policy, PolicyConfig
from forgejax.ops.rounding import AS_WRITTEN
from forgejax.rollout.engine.kv.base import KVMemory, PrefilledSequence
from forgejax.rollout.engine.sampling import Laws, draw_tokens


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, eq=False)
class SlotState:
    """What each slot is doing. ``position`` is where ``token`` will be fed; ``stop_SN`` is padded with -1."""

    token_S: jax.Array
    position_S: jax.Array
    drawn_S: jax.Array
    budget_S: jax.Array
    active_S: jax.Array
    stop_SN: jax.Array
    laws: Laws


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, eq=False)
class DecodeState:
    """The keys and values of all slots and what each is doing."""

    kv: KVMemory
    slots: SlotState


@dataclass(frozen=True, kw_only=True)
class Programs:
    """The compiled side of an engine; hashable, and a static argument of its own methods."""

    policy: PolicyConfig
    tokens_per_step: int

    def _policy(self, params: Any) -> Policy:
        graphdef, _ = nnx.split(nnx.eval_shape(lambda: Policy(self.policy, nnx.Rngs(0))))
        policy: Policy = nnx.merge(graphdef, params)
        return policy

    @functools.partial(jax.jit, static_argnums=0, compiler_options=AS_WRITTEN)
    def extend(
        self, params: Any, prefix: PrefilledSequence, tokens_T: jax.Array, count: jax.Array
    ) -> PrefilledSequence:
        """Feeds the waiting token and all but the last of ``tokens_T[:count]``; the rest of the chunk is padding."""
        fed_T = jnp.concatenate([prefix.last[None], tokens_T[:-1]])
        positions_T = prefix.length + jnp.arange(fed_T.shape[0], dtype=jnp.int32)
        length = prefix.length + count
        attend = prefix.kv.attend(positions_T[None], length)
        _, kv = self._policy(params)(fed_T[None], positions_T[None], attend, prefix.kv)
        return PrefilledSequence(kv=kv, length=length, last=tokens_T[count - 1])

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
    def insert(
        self, prefix: PrefilledSequence, state: DecodeState, slot: jax.Array, settings: dict[str, Any]
    ) -> DecodeState:
        """Starts a prefix in a slot; ``settings`` as ``SlotSettings.to_arrays`` gives them. The state is donated."""
        kv = state.kv.insert(prefix.kv, slot)
        own = SlotState(
            token_S=prefix.last,
            position_S=prefix.length,
            drawn_S=jnp.int32(0),
            budget_S=settings["budget"],
            active_S=jnp.bool_(True),
            stop_SN=settings["stop_ids"],
            laws=Laws(
                temperature_S=settings["temperature"],
                top_p_S=settings["top_p"],
                top_k_S=settings["top_k"],
                key_S2=settings["key"],
            ),
        )
        slots = jax.tree.map(lambda every, one: every.at[slot].set(one), state.slots, own)
        return DecodeState(kv=kv, slots=slots)

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
    def release(self, state: DecodeState, kept_S: jax.Array) -> DecodeState:
        """Freezes the slots that are not kept. The state is donated."""
        return replace(state, slots=replace(state.slots, active_S=state.slots.active_S & kept_S))

    @functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3, compiler_options=AS_WRITTEN)
    def generate(
        self, count: int, params: Any, state: DecodeState, version: jax.Array, mask_SW: jax.Array | None = None
    ) -> tuple[DecodeState, jax.Array]:
        """Draws ``tokens_per_step`` tokens for the first ``count`` slots, packed as ``engine`` says; donates state.

        Under a mask, of those slots, it is one token: the next mask depends on it.
        """
        policy = self._policy(params)

        def one_token(
            carry: tuple[KVMemory, SlotState], _: None
        ) -> tuple[tuple[KVMemory, SlotState], tuple[jax.Array, jax.Array, jax.Array]]:
            kv, slots = carry
            attend = kv.attend(slots.position_S[:, None], _find_longest(slots) + 1)
            hidden_S1D, kv = policy(slots.token_S[:, None], slots.position_S[:, None], attend, kv)
            logits_SV = policy.logits(hidden_S1D[:, 0])
            token_S, logp_S = draw_tokens(logits_SV, slots.laws, slots.position_S + 1, mask_SW)
            return (kv, _advance(slots, token_S)), (token_S, slots.active_S, logp_S)

        served = jax.tree.map(lambda x: x[:count], state.slots)
        (kv, served), (tokens_kS, valid_kS, logps_kS) = jax.lax.scan(
            one_token, (state.kv, served), None, length=self.tokens_per_step if mask_SW is None else 1
        )
        slots = jax.tree.map(lambda every, some: every.at[:count].set(some), state.slots, served)
        columns = [
            tokens_kS.T,
            valid_kS.T.astype(jnp.int32),
            served.drawn_S[:, None],
            jax.lax.bitcast_convert_type(logps_kS, jnp.int32).T,
            jnp.full((count, 1), version),
        ]
        return DecodeState(kv=kv, slots=slots), jnp.concatenate(columns, axis=1)


def _find_longest(slots: SlotState) -> jax.Array:
    """The furthest position an active slot feeds; free slots read less than their own, and nobody reads them."""
    return jnp.max(jnp.where(slots.active_S, slots.position_S, 0))


def _advance(slots: SlotState, token_S: jax.Array) -> SlotState:
    """Moves the active slots on by the token they drew; the others stay frozen."""
    active_S = slots.active_S
    step_S = active_S.astype(jnp.int32)
    budget_S = slots.budget_S - step_S
    stopped_S = jnp.any(token_S[:, None] == slots.stop_SN, axis=-1)
    return replace(
        slots,
        token_S=jnp.where(active_S, token_S, slots.token_S),
        position_S=slots.position_S + step_S,
        drawn_S=slots.drawn_S + step_S,
        budget_S=budget_S,
        active_S=active_S & ~stopped_S & (budget_S > 0),
    )
