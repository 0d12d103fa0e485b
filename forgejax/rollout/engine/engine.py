"""The policy behind JetStream's ``Engine`` contract: prefill, insert, generate, over a mesh of its own.

The contract's prefixes and its decode state live in one pool, ``Slots``, which is changed in place: a prefix is a
sequence that holds its pages for as long as somebody refers to it. Our driver makes ``Slots`` of its own.

``ResultTokens.data`` is int32 [slots, 3k + 2]: k tokens, k valid flags, the drawn length, k log-probs (the bits of a
float32) and the version of the weights that drew them; k is ``tokens_per_step``, and 1 in a step under masks.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from forgejax.errors import EngineError, MeshError
from forgejax.models import PolicyConfig, abstract_policy, init_params
from forgejax.ops.paged.attention import pick_paged_kernel
from forgejax.rollout.engine._jetstream import engine_api, tokenizer_api, tokenizer_pb2
from forgejax.rollout.engine.config import EngineConfig
from forgejax.rollout.engine.programs import Programs
from forgejax.rollout.engine.settings import SlotSettings
from forgejax.rollout.engine.slots import Slots
from forgejax.rollout.engine.weights import PublishedWeights, WeightBox
from forgejax.sharding import EngineMesh, Layout, build_engine_mesh
from forgejax.types import TokenIds


@dataclass(frozen=True, kw_only=True, eq=False)
class PrefilledSequence:
    """A sequence of the engine's pool: ``ids``, of which the last waits to be fed."""

    key: int
    ids: TokenIds


@dataclass(kw_only=True)
class _Reach:
    """How many tokens of a slot may have been fed after the last ``generate``, and at most ever."""

    fed: int
    limit: int


class IdTokenizer(tokenizer_api.Tokenizer):
    """The tokenizer of an engine that speaks token ids: text is refused, no id stops a generation by itself."""

    pad_id, eos_id, bos_id = 0, -1, -1
    stop_tokens: frozenset[int] = frozenset()

    def encode(self, s: str, **_options: object) -> tuple[np.ndarray, int]:
        raise NotImplementedError("this engine takes token ids, not text")

    def decode(self, token_ids: list[int], **_options: object) -> str:
        return ""


class PolicyEngine(engine_api.Engine):
    """A policy over the mesh of a layout, which splits nothing but heads, MLP, vocabulary and experts.

    ``params`` arguments take a ``WeightBox`` or one set of ``PublishedWeights``.
    """

    def __init__(self, policy: PolicyConfig, config: EngineConfig, layout: Layout | None = None):
        """``layout``: of ``build_engine_mesh``; None is jax's first device. Raises MeshError for a policy that it
        cannot split."""
        self.policy, self.config = policy, config
        layout = layout if layout is not None else Layout(mesh=build_engine_mesh(EngineMesh(), jax.devices()))
        _check_layout(policy, layout)
        self.layout = spread_experts(policy, layout)
        self.abstract_params = abstract_policy(policy)[1]
        self._placements = self.layout.placements(self.abstract_params)
        self._programs = Programs(
            policy=policy,
            kernel=pick_paged_kernel(self.layout.platform, batch_invariant=config.batch_invariant),
            layout=self.layout,
            page_tokens=config.page_tokens,
            tokens_per_step=config.tokens_per_step,
        )
        self._lock = threading.RLock()  # reentrant: a prefix may be collected anywhere
        self._slots: Slots | None = None
        self._keys = itertools.count(config.slots)
        self._abandoned: deque[int] = deque()
        self._decoding: dict[int, _Reach] = {}

    # -- JetStream's contract ------------------------------------------------------------------------------------

    def load_params(self, params: Any = None, version: int = 0) -> WeightBox:
        """A box holding a copy of ``params`` (randomly initialised if None) on the engine's devices."""
        if params is None:
            params = init_params(self.policy, self.layout, self.config.seed)
        return WeightBox(params, version, self._placements)

    def prefill(
        self, *, params: Any, existing_prefix: PrefilledSequence | None = None, padded_tokens: Any, true_length: int
    ) -> PrefilledSequence:
        """Appends ``padded_tokens[:true_length]`` to a prefix; the existing one stays valid.

        Raises ValueError for a whole sequence beyond ``max_context`` and EngineError where the pool has no room for it.
        """
        tokens = np.asarray(padded_tokens, np.int32)
        if not 1 <= true_length <= len(tokens):
            raise ValueError(f"true_length {true_length}: expected 1 to {len(tokens)}, the padded length")
        with self._turn() as slots:
            key, known, ids = next(self._keys), 0, tokens[:true_length]
            if existing_prefix is None:
                begun = slots.begin(key, ids)
            else:
                known, ids = len(existing_prefix.ids) - 1, np.concatenate([existing_prefix.ids, ids])
                begun = slots.fork(existing_prefix.key, key, known, len(ids))
            if begun is None:
                raise EngineError(f"no room for {len(ids)} tokens; release a prefix or raise engine.kv_pages")
            computed = begun.cached_tokens
            while computed < len(ids) - 1:
                computed += slots.extend(_take_current(params), key, ids[:-1], computed)
            sequence = PrefilledSequence(key=key, ids=ids)
            weakref.finalize(sequence, self._abandoned.append, key)
            return sequence

    def insert(
        self, prefix: PrefilledSequence, decode_state: Slots, slot: int, settings: SlotSettings | None = None
    ) -> Slots:
        """Puts a prefix into a slot and starts it under ``settings`` (by default the whole policy, to the end).

        The prefix stays valid; what was in the slot is released. Raises EngineError where the pool has no room.
        """
        settings = settings if settings is not None else SlotSettings(budget=self.config.max_context)
        length = len(prefix.ids)
        limit = min(length + settings.budget, self.config.max_context)
        with self._turn() as slots:
            if self._decoding.pop(slot, None) is not None:
                slots.stop([slot])
                slots.cache.release(slot)
            if slots.fork(prefix.key, slot, length - 1, length) is None:
                raise EngineError(
                    f"no room for {length} tokens in slot {slot}; release a prefix or raise engine.kv_pages"
                )
            budget = max(limit - length, 1)
            slots.start(slot, int(prefix.ids[-1]), length - 1, dataclasses.replace(settings, budget=budget))
            self._decoding[slot] = _Reach(fed=length - 1, limit=limit)
        return decode_state

    def generate(
        self, params: Any, decode_state: Slots, rows: int | None = None, mask_SW: NDArray[np.uint32] | None = None
    ) -> tuple[Slots, engine_api.ResultTokens]:
        """Draws up to k tokens for every active slot; a slot that meets a stop id or its budget freezes at once.

        ``rows``: only the first slots up to this many are served (all by default), at the cost of those alone.
        ``mask_SW``, of all slots, says what may be drawn (see ``draw_tokens``): then k is 1 in this step. Raises
        EngineError where the pool has no room for what may be drawn.
        """
        served = self.config.slots if rows is None else rows
        with self._turn() as slots:
            for slot, reach in self._decoding.items():
                if slot < served:
                    reach.fed = min(reach.fed + self.config.tokens_per_step, reach.limit)
                    if not slots.grow(slot, reach.fed):
                        raise EngineError(f"no room for {reach.fed} tokens in slot {slot}; raise engine.kv_pages")
            return decode_state, slots.generate(_take_current(params), served, mask_SW)

    def init_decode_state(self) -> Slots:
        """The slots, every one of them free. An engine has one pool: states made before are no longer valid."""
        with self._turn() as slots:
            slots.stop(list(self._decoding))
            for slot in self._decoding:
                slots.cache.release(slot)
            self._decoding.clear()
            return slots

    def get_prefix_destination_sharding(self) -> jax.sharding.Sharding | None:
        return self.layout.sharding()

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
        assert self.layout.mesh is not None
        return self.layout.mesh

    @property
    def colocated_cpus(self) -> None:
        return None

    # -- What our driver needs beyond it ---------------------------------------------------------------------------

    def make_slots(self) -> Slots:
        """A pool of one's own, and its slots: it takes the device memory of them."""
        return Slots(self._programs, self.config)

    @contextmanager
    def _turn(self) -> Iterator[Slots]:
        """The slots of JetStream's threads, for one of them at a time. Prefixes that nobody refers to are released."""
        with self._lock:
            if self._slots is None:
                self._slots = self.make_slots()
            while self._abandoned:
                self._slots.cache.release(self._abandoned.popleft())
            yield self._slots


def _take_current(params: WeightBox | PublishedWeights) -> PublishedWeights:
    return params.current if isinstance(params, WeightBox) else params


def spread_experts(policy: PolicyConfig, layout: Layout) -> Layout:
    """The layout with a mixture's experts whole, dealt to all devices, where there are as many for each.

    Cut along their width they may be no whole lanes of a TPU wide, and its compiler would bring the experts of all
    layers into another form before each step, in as much memory again and more.
    """
    tensor, expert = layout.devices("tensor"), layout.devices("expert")
    if tensor == 1 or not policy.moe.num_experts or policy.moe.num_experts % (tensor * expert):
        return layout
    rules = dataclasses.replace(layout.rules, experts=("expert", "tensor"), expert_mlp=())
    return dataclasses.replace(layout, rules=rules)


def _check_layout(policy: PolicyConfig, layout: Layout) -> None:
    """Raises MeshError for devices that would all do the same work."""
    if rest := layout.devices("data", "fsdp", "context") - 1:
        raise MeshError(
            f"an engine's mesh has axes tensor and expert alone; this one has {rest + 1} devices along others"
        )
    if layout.devices("expert") > 1 and not policy.moe.num_experts:
        raise MeshError(
            f"an engine's mesh of expert {layout.devices('expert')} for a policy without experts; set expert to 1, and "
            "tensor to the number of devices"
        )
