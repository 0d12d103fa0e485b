"""The engine's device programs and the pytrees they work on.

The programs depend on the policy's shape, the layout, the pages and the number of tokens per step alone: equal engines
share what is compiled. The pool is split by heads, the logits that tokens are drawn from by slots; all else but the
weights is whole on every device.

Dimension key: S slots, N stop ids or biases, M pages of a sequence, k tokens per step, T new tokens of a batch.
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
from forgejax.rollout.engine.drafts import Drafts, count_drawn, lay_drafts
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
                min_p_S=settings["min_p"],
                biased_SN=settings["biased"],
                bias_SN=settings["bias"],
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
            advanced = _advance(slots, token_S, slots.active_S.astype(jnp.int32))
            return self._laid(pool, advanced), (token_S, slots.active_S, logp_S)

        served, length = jax.tree.map(lambda x: x[:count], slots), self.tokens_per_step if mask_SW is None else 1
        with self.layout.scope():
            (pool, served), (tokens_kS, valid_kS, logps_kS) = jax.lax.scan(
                one_token, (pool, served), None, length=length
            )
        return self._give(pool, slots, served, (tokens_kS.T, valid_kS.T, logps_kS.T), version)

    @functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3, compiler_options=AS_WRITTEN)
    def check(
        self,
        count: int,
        params: Any,
        state: tuple[Any, SlotState],
        allowed: tuple[jax.Array, jax.Array | None, Drafts],
        version: jax.Array,
    ) -> tuple[tuple[Any, SlotState], jax.Array]:
        """Draws for the first ``count`` slots as many tokens as their drafts hold good for, and one more.

        Else as ``generate``, with X for k and the drafts of these slots behind the mask: what a slot draws is what that
        would draw, to rounding. A mask is of the first place alone: whoever may not draw everything has no draft.
        """
        policy, (pool, slots), (tables_SM, mask_SW, drafts) = self._policy(params), state, allowed
        served: SlotState = jax.tree.map(lambda x: x[:count], slots)
        active_S, X = served.active_S, drafts.ids_SD.shape[1] + 1
        fed = lay_drafts(drafts, served.token_S, jnp.where(active_S, served.budget_S, 1))
        batch = PagedBatch(
            tables_NM=jnp.where(active_S[:, None], tables_SM[:count], NOBODY),
            lengths_N=jnp.where(active_S, served.position_S + fed.count_S, fed.count_S),
            starts_O=fed.starts_O,
            count=jnp.int32(count),
            singles=0,
            page_tokens=self.page_tokens,
            longest=X,
        )
        every_X = jnp.arange(X, dtype=jnp.int32)
        with self.layout.scope():
            hidden_TD, pool = self._run(policy, fed.tokens_T, pool, batch)
            logits_NV = constrain(policy.logits(hidden_TD[fed.row_SX.reshape(-1)]), None, "vocab")
            laws = jax.tree.map(lambda x: jnp.repeat(x, X, axis=0), served.laws)
            positions_SX = served.position_S[:, None] + 1 + every_X[None]
            if mask_SW is not None:
                free = jnp.iinfo(jnp.uint32).max
                mask_SXW = jnp.where((every_X == 0)[None, :, None], mask_SW[:, None], jnp.uint32(free))
                mask_SW = mask_SXW.reshape(count * X, -1)
            drawn = draw_tokens(constrain(logits_NV, "draws", None), laws, positions_SX.reshape(-1), mask_SW)
        token_SX, logp_SX = (x.reshape(count, X) for x in drawn)
        stopped_SX = jnp.any(token_SX[:, :, None] == served.stop_SN[:, None], axis=-1)
        drawn_S = jnp.where(active_S, count_drawn(drafts, fed.count_S, token_SX, stopped_SX), 0)
        last_S = jnp.take_along_axis(token_SX, jnp.maximum(drawn_S - 1, 0)[:, None], axis=1)[:, 0]
        valid_SX = every_X[None] < drawn_S[:, None]
        return self._give(pool, slots, _advance(served, last_S, drawn_S), (token_SX, valid_SX, logp_SX), version)

    def _give(
        self, pool: Any, slots: SlotState, served: SlotState, drawn: tuple[jax.Array, ...], version: jax.Array
    ) -> tuple[tuple[Any, SlotState], jax.Array]:
        """The state with the served slots in their places, and what they drew as ``engine`` says."""
        (token_Sk, valid_Sk, logp_Sk), count = drawn, len(served.drawn_S)
        slots = jax.tree.map(lambda every, some: every.at[:count].set(some), slots, served)
        columns = [
            token_Sk,
            valid_Sk.astype(jnp.int32),
            served.drawn_S[:, None],
            jax.lax.bitcast_convert_type(logp_Sk, jnp.int32),
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


def _advance(slots: SlotState, token_S: jax.Array, step_S: jax.Array) -> SlotState:
    """Moves the active slots on by the tokens they drew, of which ``token_S`` is the last; the others stay frozen."""
    active_S = slots.active_S
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
            min_p_S=jnp.zeros(S, jnp.float32),
            biased_SN=jnp.full((S, config.max_biased_ids), -1, jnp.int32),
            bias_SN=jnp.zeros((S, config.max_biased_ids), jnp.float32),
            key_S2=jnp.zeros((S, 2), jnp.uint32),
        ),
    )
