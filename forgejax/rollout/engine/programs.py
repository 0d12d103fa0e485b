"""The engine's device programs and the pytrees they work on.

The programs depend on the policy's shape, the layout, the pages and the number of tokens per step alone: equal engines
share what is compiled. The pool is split by heads, the logits that tokens are drawn from by slots; all else but the
weights is whole on every device.

Dimension key: S slots, N stop ids, M pages of a sequence, k tokens per step, T new tokens of a batch.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from forgejax.models import Policy, PolicyConfig
from forgejax.ops.paged.attention import PagedKernel, copy_page, count_kept_heads, paged_attention
from forgejax.ops.paged.batch import NOBODY, PagedBatch
from forgejax.ops.rounding import AS_WRITTEN
from forgejax.rollout.engine.config import EngineConfig
from forgejax.rollout.engine.sampling import Laws, draw_tokens
from forgejax.sharding import Layout, constrain


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


@dataclass(frozen=True, kw_only=True)
class Programs:
    """The compiled side of an engine; hashable, and a static argument of its own methods."""

    policy: PolicyConfig
    kernel: PagedKernel
    layout: Layout
    page_tokens: int
    tokens_per_step: int

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def make(self, config: EngineConfig) -> tuple[Any, SlotState]:
        """An empty pool, and every slot free."""
        axis = self.layout.axis("heads")
        pool = self.kernel.make_pool(
            layers=self.policy.num_layers,
            pages=config.pool_pages,
            page_tokens=self.page_tokens,
            kv_heads=count_kept_heads(self.policy.num_kv_heads, self.layout.devices(axis) if axis else 1),
            head_size=self.policy.head_size,
            dtype=self.policy.compute_dtype,
        )
        return self._laid(pool, _free(config))

    def _policy(self, params: Any) -> Policy:
        graphdef, _ = nnx.split(nnx.eval_shape(lambda: Policy(self.policy, nnx.Rngs(0))))
        policy: Policy = nnx.merge(graphdef, params)
        return policy

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=2, compiler_options=AS_WRITTEN)
    def extend(
        self, params: Any, pool: Any, tokens_T: jax.Array, table_M: jax.Array, span: tuple[jax.Array, jax.Array]
    ) -> Any:
        """The pool with the keys and values of a chunk of one sequence. Donates it.

        ``span``: the place of its first token in the sequence, and how many there are; the rest is padding.
        """
        start, count = span
        batch = PagedBatch(
            tables_NM=table_M[None],
            lengths_N=(start + count)[None],
            starts_O=jnp.stack([jnp.zeros_like(count), count]),
            count=jnp.int32(1),
            singles=0,
            page_tokens=self.page_tokens,
        )
        with self.layout.scope():
            return self._laid(self._run(self._policy(params), tokens_T, pool, batch)[1], None)[0]

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
    def copy(self, pool: Any, source: jax.Array, target: jax.Array) -> Any:
        """The pool with one page copied to another. Donates it."""
        return self._laid(copy_page(pool, source, target), None)[0]

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
    def insert(
        self, slots: SlotState, slot: jax.Array, token: jax.Array, position: jax.Array, settings: dict[str, Any]
    ) -> SlotState:
        """Starts a slot that feeds ``token`` first; ``settings`` as ``SlotSettings.to_arrays`` gives them."""
        own = SlotState(
            token_S=token,
            position_S=position,
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
        return self._laid(None, jax.tree.map(lambda every, one: every.at[slot].set(one), slots, own))[1]

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
    def release(self, slots: SlotState, kept_S: jax.Array) -> SlotState:
        """Freezes the slots that are not kept."""
        return self._laid(None, replace(slots, active_S=slots.active_S & kept_S))[1]

    @functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3, compiler_options=AS_WRITTEN)
    def generate(
        self,
        count: int,
        params: Any,
        state: tuple[Any, SlotState],
        allowed: tuple[jax.Array, jax.Array | None],
        version: jax.Array,
    ) -> tuple[tuple[Any, SlotState], jax.Array]:
        """Draws ``tokens_per_step`` tokens for the first ``count`` slots, packed as ``engine`` says.

        ``state``: the pool and all slots; donated. ``allowed``: the pages of each slot [S, M], neither read nor written
        where it is not active; and the mask [count, W] of what may be drawn (see ``draw_tokens``), or None. Under one
        it is a single token, for the next mask depends on it.
        """
        policy, (pool, slots), (tables_SM, mask_SW) = self._policy(params), state, allowed

        def one_token(
            carry: tuple[Any, SlotState], _: None
        ) -> tuple[tuple[Any, SlotState], tuple[jax.Array, jax.Array, jax.Array]]:
            pool, slots = carry
            batch = PagedBatch(
                tables_NM=jnp.where(slots.active_S[:, None], tables_SM[:count], NOBODY),
                lengths_N=jnp.where(slots.active_S, slots.position_S + 1, 1),
                starts_O=jnp.arange(count + 1, dtype=jnp.int32),
                count=jnp.int32(count),
                singles=count,
                page_tokens=self.page_tokens,
            )
            hidden_SD, pool = self._run(policy, slots.token_S, pool, batch)
            # Made where the vocabulary's weights are: for slots at once, these would be gathered instead of the logits.
            logits_SV = constrain(constrain(policy.logits(hidden_SD), None, "vocab"), "draws", None)
            token_S, logp_S = draw_tokens(logits_SV, slots.laws, slots.position_S + 1, mask_SW)
            return self._laid(pool, _advance(slots, token_S)), (token_S, slots.active_S, logp_S)

        served, length = jax.tree.map(lambda x: x[:count], slots), self.tokens_per_step if mask_SW is None else 1
        with self.layout.scope():
            (pool, served), (tokens_kS, valid_kS, logps_kS) = jax.lax.scan(
                one_token, (pool, served), None, length=length
            )
        slots = jax.tree.map(lambda every, some: every.at[:count].set(some), slots, served)
        columns = [
            tokens_kS.T,
            valid_kS.T.astype(jnp.int32),
            served.drawn_S[:, None],
            jax.lax.bitcast_convert_type(logps_kS, jnp.int32).T,
            jnp.full((count, 1), version),
        ]
        data = jnp.concatenate(columns, axis=1)
        return self._laid(pool, slots), jax.lax.with_sharding_constraint(data, self.layout.sharding())

    def _laid(self, pool: Any, slots: Any) -> tuple[Any, Any]:
        """The pool split by heads and the slots whole on every device, of every program alike: no call is compiled
        twice because an earlier one left its arrays elsewhere."""
        with self.layout.scope():
            pool = jax.tree.map(lambda x: constrain(x, None, None, None, "heads", *(None,) * (x.ndim - 4)), pool)
            return pool, jax.tree.map(lambda x: constrain(x, *(None,) * x.ndim), slots)

    def _run(self, policy: Policy, tokens_T: jax.Array, pool: Any, batch: PagedBatch) -> tuple[jax.Array, Any]:
        """Hidden states [T, D] of a batch's new tokens, and the pool with their keys and values."""

        def attend(
            layer: jax.Array, q_BTHC: jax.Array, k_BTKC: jax.Array, v_BTKC: jax.Array, pool: Any
        ) -> tuple[jax.Array, Any]:
            qkv = q_BTHC[0], k_BTKC[0], v_BTKC[0]
            out_THC, pool = paged_attention(
                *qkv,
                pool,
                layer,
                batch=batch,
                kernel=self.kernel,
                mesh=self.layout.mesh,
                head_axis=self.layout.axis("heads"),
            )
            return out_THC[None], pool

        positions_T = batch.place_tokens(len(tokens_T)).position_T
        hidden_BTD, pool = policy(tokens_T[None], positions_T[None], attend, pool)
        return hidden_BTD[0], pool


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


def _free(config: EngineConfig) -> SlotState:
    """Every slot free."""
    S = config.slots
    return SlotState(
        token_S=jnp.zeros(S, jnp.int32),
        position_S=jnp.zeros(S, jnp.int32),
        drawn_S=jnp.zeros(S, jnp.int32),
        budget_S=jnp.zeros(S, jnp.int32),
        active_S=jnp.zeros(S, jnp.bool_),
        stop_SN=jnp.full((S, config.max_stop_ids), -1, jnp.int32),
        laws=Laws(
            temperature_S=jnp.ones(S, jnp.float32),
            top_p_S=jnp.ones(S, jnp.float32),
            top_k_S=jnp.zeros(S, jnp.int32),
            key_S2=jnp.zeros((S, 2), jnp.uint32),
        ),
    )
