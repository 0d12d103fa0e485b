"""What each program of a run takes of a chip beside what lies there, counted from shapes.

A model of what the compiler lays out, within half a GiB of what it wants for an 8B policy on five splits of a v5e-64.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from forgejax.learner.step.memory import choose_kept, count_activation_bytes
from forgejax.models import Kept, PolicyConfig
from forgejax.run.plan.publication import SLICE_BYTES
from forgejax.run.plan.residents import Residents, Site
from forgejax.sharding import Layout

_STREAMS = 6  # arrays of a layer's tokens that exist at once in its backward pass, of each width


@dataclasses.dataclass(frozen=True, kw_only=True)
class Need:
    """One program: bytes of each chip that it takes beside the residents."""

    name: str
    bytes: int
    compiled: bool = False


def count_needs(site: Site, residents: Residents) -> list[Need]:
    """Of all programs of a run on this site; what a trunk adds, to its last one, is never compiled here."""
    policy, layout = site.config.policy, site.learner
    tokens = site.config.packing.rows * layout.shards("rows") * site.config.packing.row_length
    keep = choose_kept_of(site)
    step = count_step_bytes(policy, tokens, keep, layout)
    needs = [
        Need(name="accumulate", bytes=step),
        Need(name="score", bytes=step - _count_kept(policy, tokens, keep, layout)),
        Need(name="apply", bytes=residents.weights + residents.masters // 8),
        Need(name="cast", bytes=residents.weights),
    ]
    if site.config.packing.trunks:
        needs.append(Need(name="pull_back", bytes=step + _count_trunk(policy, tokens, layout)))
    head = policy.vocab_size * policy.d_model * jnp.dtype(policy.param_dtype).itemsize // site.replica.shards("vocab")
    needs.append(Need(name="publish", bytes=_count_publication(site, residents, head)))
    if site.engine is None:
        return needs
    logits = 3 * site.config.engine.slots * policy.vocab_size * 4
    return [
        *needs,
        Need(name="decode", bytes=2 * head + logits),
        Need(name="prefill", bytes=site.config.engine.prefill_buckets[-1] * _layer_width(policy, site.engine)),
    ]


def _count_trunk(policy: PolicyConfig, tokens: int, layout: Layout) -> int:
    """Keys and values of a trunk as long as a row, and their gradients in FP32."""
    own = -(-tokens // layout.shards("rows"))
    each = 2 * max(policy.num_kv_heads // layout.shards("kv_heads"), 1) * policy.head_size
    return policy.num_layers * own * each * (jnp.dtype(policy.compute_dtype).itemsize + 4)


def _count_publication(site: Site, residents: Residents, head: int) -> int:
    """A piece and its copy; of a weight whose heads the learner splits over fewer chips than the engine does, the
    whole is gathered first."""
    tensor, own = site.replica.shards("heads"), site.learner.shards("heads")
    return 2 * max(min(SLICE_BYTES, residents.replica), head) * (1 if own % tensor == 0 else tensor)


def choose_kept_of(site: Site) -> Kept:
    """What layers keep on this site, for full rows."""
    config = site.config.step
    if config.keep != "auto":
        return config.keep
    rows = site.config.packing.rows * site.learner.shards("rows")
    tokens = rows * site.config.packing.row_length
    return choose_kept(site.config.policy, tokens, config.activation_gib, layout=site.learner)


def count_step_bytes(policy: PolicyConfig, tokens: int, keep: Kept, layout: Layout) -> int:
    """Of ``accumulate``, for the tokens of a micro-batch: what layers keep, one layer's arrays and gathered weights,
    the keys and values of a shared row with their gradients, and gradients as narrow as the weights."""
    width = jnp.dtype(policy.compute_dtype).itemsize
    own = -(-tokens // layout.shards("rows", "length"))
    row = -(-tokens // layout.shards("rows"))
    narrow = jnp.dtype(policy.param_dtype).itemsize
    weights = sum(_weights_of_layer(policy, layout)) * narrow
    split = max(layout.shards("embed"), 1)
    gathered = (2 + 1) * weights  # two layers' at a time, and a gradient
    grads = policy.num_layers * weights // split if narrow < 4 else 0
    head = policy.vocab_size * policy.d_model // layout.shards("vocab")
    keys = 0
    if layout.shards("length") > 1:
        kv_heads = max(policy.num_kv_heads // layout.shards("kv_heads"), 1)
        keys = 3 * 2 * row * kv_heads * policy.head_size * width
    layer = own * _layer_width(policy, layout) + keys + gathered
    return _count_kept(policy, tokens, keep, layout) + grads + max(layer, head * (narrow + 4))


def _count_kept(policy: PolicyConfig, tokens: int, keep: Kept, layout: Layout) -> int:
    own = -(-tokens // layout.shards("rows", "length"))
    if keep == "share":
        shares = layout.shards("kept") // layout.shards("length")
        return count_activation_bytes(policy, own, "nothing", layout=layout) // shares
    # Nothing tells what the compiler keeps of all: at least what products are.
    return count_activation_bytes(policy, own, "products" if keep == "all" else keep, layout=layout)


def _layer_width(policy: PolicyConfig, layout: Layout) -> int:
    """Bytes of a token's arrays within one layer."""
    width, tensor = jnp.dtype(policy.compute_dtype).itemsize, layout.shards("mlp")
    if policy.moe.num_experts:
        visited = policy.moe.experts_per_token * (3 * policy.d_model + 4 * policy.expert_width // tensor)
        return (_STREAMS * policy.d_model + visited) * width
    return _STREAMS * (policy.d_model + policy.d_ff // tensor) * width


def _weights_of_layer(policy: PolicyConfig, layout: Layout) -> tuple[int, int]:
    """Of attention and of the MLP, on a chip that has gathered what ``embed`` splits."""
    heads = 2 * policy.d_model * policy.head_size * (policy.num_heads + policy.num_kv_heads)
    experts = policy.moe.num_experts
    mlp = 3 * policy.d_model * (policy.expert_width * experts if experts else policy.d_ff)
    shards = layout.shards("mlp") * (layout.shards("experts") if experts else 1)
    return heads // layout.shards("heads"), mlp // shards
