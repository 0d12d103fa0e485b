"""The policy behind JetStream's ``Engine`` contract: prefill, insert, generate, on one device.

A sequence is held as keys and values of all its tokens but the last, which waits to be fed: so the first ``generate``
draws the first token, and a prefix may be continued by more tokens at any time. Decode state is donated: after
``generate``, ``insert`` or ``release`` only the returned state may be used.

``ResultTokens.data`` is int32 [slots, 3k + 2]: k tokens, k valid flags, the drawn length, k log-probs (the bits of a
float32) and the version of the weights that drew them; k is ``tokens_per_step``, and 1 in a step under masks.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from flax import nnx
from numpy.typing import NDArray

from forgejax.models import Policy, PolicyConfig
from forgejax.rollout.engine._jetstream import engine_api, tokenizer_api, tokenizer_pb2
from forgejax.rollout.engine.config import EngineConfig
from forgejax.rollout.engine.kv.base import KVCache, KVMemory, PrefilledSequence
from forgejax.rollout.engine.kv.contiguous import ContiguousCache
from forgejax.rollout.engine.kv.rows import make_rows
from forgejax.rollout.engine.programs import DecodeState, Programs, SlotState
from forgejax.rollout.engine.sampling import Laws
from forgejax.rollout.engine.settings import SlotSettings
from forgejax.rollout.engine.weights import PublishedWeights, WeightBox
from forgejax.types import TokenIds

# A chunk is padded to the next bucket unless that wastes more than a third of it; then a smaller bucket goes first.
_PADDING = 1.5


class IdTokenizer(tokenizer_api.Tokenizer):
    """The tokenizer of an engine that speaks token ids: text is refused, no id stops a generation by itself."""

    pad_id, eos_id, bos_id = 0, -1, -1
    stop_tokens: frozenset[int] = frozenset()

    def encode(self, s: str, **_options: object) -> tuple[np.ndarray, int]:
        raise NotImplementedError("this engine takes token ids, not text")

    def decode(self, token_ids: list[int], **_options: object) -> str:
        return ""


class PolicyEngine(engine_api.Engine):
    """A policy on one device. ``params`` arguments take a ``WeightBox`` or one set of ``PublishedWeights``."""

    def __init__(self, policy: PolicyConfig, config: EngineConfig, device: jax.Device | None = None):
        self.policy, self.config = policy, config
        self.device = device if device is not None else jax.devices()[0]
        abstract = nnx.eval_shape(lambda: Policy(policy, nnx.Rngs(0)))
        self.abstract_params = nnx.split(abstract)[1]
        self._programs = Programs(policy=policy, tokens_per_step=config.tokens_per_step)
        # Program constants of JAX are placed on the default device unless told otherwise.
        with jax.default_device(self.device):
            self._empty = self._make_memory(1)

    # -- JetStream's contract ------------------------------------------------------------------------------------

    def load_params(self, params: Any = None, version: int = 0) -> WeightBox:
        """A box holding a copy of ``params`` (randomly initialised if None) on the engine's device."""
        if params is None:
            params = nnx.split(Policy(self.policy, nnx.Rngs(self.config.seed)))[1]
        return WeightBox(params, version, self.device)

    def prefill(
        self, *, params: Any, existing_prefix: PrefilledSequence | None = None, padded_tokens: Any, true_length: int
    ) -> PrefilledSequence:
        """Appends ``padded_tokens[:true_length]`` to a prefix; the existing one stays valid.

        The caller keeps the whole sequence within ``max_context``; one program is compiled per padded length.
        """
        tokens = np.asarray(padded_tokens, np.int32)
        if not 1 <= true_length <= len(tokens):
            raise ValueError(f"true_length {true_length}: expected 1 to {len(tokens)}, the padded length")
        if existing_prefix is None:
            existing_prefix = self.begin_sequence(int(tokens[0]))
            if true_length == 1:
                return existing_prefix
            tokens, true_length = np.append(tokens[1:], np.int32(0)), true_length - 1
        weights = _take_current(params)
        return self._programs.extend(weights.params, existing_prefix, self._put(tokens), np.int32(true_length))

    def insert(
        self, prefix: PrefilledSequence, decode_state: DecodeState, slot: int, settings: SlotSettings | None = None
    ) -> DecodeState:
        """Puts a prefix into a slot and starts it under ``settings`` (by default the whole policy, to the end)."""
        settings = settings if settings is not None else SlotSettings(budget=self.config.max_context)
        return self._programs.insert(prefix, decode_state, np.int32(slot), settings.to_arrays(self.config.max_stop_ids))

    def generate(
        self,
        params: Any,
        decode_state: DecodeState,
        rows: int | None = None,
        mask_SW: NDArray[np.uint32] | None = None,
    ) -> tuple[DecodeState, engine_api.ResultTokens]:
        """Draws up to k tokens for every active slot; a slot that meets a stop id or its budget freezes at once.

        ``rows``: only the first slots up to this many are served (all by default), at the cost of those alone.
        ``mask_SW``, of all slots, says what may be drawn (see ``draw_tokens``): then k is 1 in this step.
        """
        weights = _take_current(params)
        served = self.config.slots if rows is None else rows
        bucket = min(bucket for bucket in self.config.decode_rows if bucket >= served)
        mask = None if mask_SW is None else self._put(mask_SW[:bucket])
        state, data = self._programs.generate(bucket, weights.params, decode_state, np.int32(weights.version), mask)
        k = self.config.tokens_per_step if mask_SW is None else 1
        return state, engine_api.ResultTokens(data, (0, k), (k, 2 * k), (2 * k, 2 * k + 1), 1)

    def init_decode_state(self) -> DecodeState:
        """A state with every slot free."""
        S = self.config.slots

        def fill(value: float, dtype: Any, *shape: int) -> jax.Array:
            return self._put(np.full((S, *shape), value, dtype))

        laws = Laws(
            temperature_S=fill(1.0, np.float32),
            top_p_S=fill(1.0, np.float32),
            top_k_S=fill(0, np.int32),
            key_S2=fill(0, np.uint32, 2),
        )
        slots = SlotState(
            token_S=fill(0, np.int32),
            position_S=fill(0, np.int32),
            drawn_S=fill(0, np.int32),
            budget_S=fill(0, np.int32),
            active_S=fill(0, np.bool_),
            stop_SN=fill(-1, np.int32, self.config.max_stop_ids),
            laws=laws,
        )
        with jax.default_device(self.device):
            return DecodeState(kv=self._make_memory(S), slots=slots)

    def get_prefix_destination_sharding(self) -> jax.sharding.Sharding:
        return jax.sharding.SingleDeviceSharding(self.device)

    def get_tokenizer(self) -> Any:
        return tokenizer_pb2.TokenizerParameters(path="token-ids")

    def build_tokenizer(self, metadata: Any) -> IdTokenizer:
        return IdTokenizer()

    @property
    def max_concurrent_decodes(self) -> int:
        return self.config.slots

    @property
    def samples_per_slot(self) -> int:
        return 1

    @property
    def max_prefill_length(self) -> int:
        return self.config.max_context

    @property
    def mesh(self) -> jax.sharding.Mesh:
        return jax.sharding.Mesh(np.array([self.device]), ("engine",))

    @property
    def colocated_cpus(self) -> None:
        return None

    # -- What our driver needs beyond it ---------------------------------------------------------------------------

    def make_cache(self) -> KVCache:
        """The host's side of the keys and values, for one driver."""
        return ContiguousCache(self.policy, self.config, self.device, self)

    def begin_sequence(self, token: int) -> PrefilledSequence:
        """See ``Prefiller``."""
        return self.resume_sequence(self._empty, 0, token)

    def resume_sequence(self, kv: KVMemory, length: int, token: int) -> PrefilledSequence:
        """See ``Prefiller``."""
        return PrefilledSequence(kv=kv, length=self._put(np.int32(length)), last=self._put(np.int32(token)))

    def append(
        self, params: WeightBox | PublishedWeights, prefix: PrefilledSequence, ids: TokenIds
    ) -> PrefilledSequence:
        """The sequence continued by any number of tokens, in as many padded chunks as that takes."""
        buckets = self.config.prefill_buckets
        while len(ids):
            fitting = [bucket for bucket in buckets if len(ids) <= bucket <= max(_PADDING * len(ids), buckets[0])]
            bucket = fitting[0] if fitting else max(bucket for bucket in buckets if bucket <= len(ids))
            count = min(bucket, len(ids))
            chunk = np.zeros(bucket, np.int32)
            chunk[:count] = ids[:count]
            prefix = self.prefill(params=params, existing_prefix=prefix, padded_tokens=chunk, true_length=count)
            ids = ids[count:]
        return prefix

    def release(self, decode_state: DecodeState, kept: np.ndarray) -> DecodeState:
        """Ends the generations of the slots where ``kept`` [S] is False; their keys and values stay as they are."""
        return self._programs.release(decode_state, self._put(np.asarray(kept, np.bool_)))

    def _make_memory(self, sequences: int) -> KVMemory:
        return jax.device_put(make_rows(self.policy, sequences, self.config.row_tokens), self.device)

    def _put(self, value: Any) -> jax.Array:
        return jax.device_put(value, self.device)


def _take_current(params: WeightBox | PublishedWeights) -> PublishedWeights:
    return params.current if isinstance(params, WeightBox) else params
