"""One optimizer step on merged prefix trees against the same samples unmerged, each a chain of its own.

``--peer tunix`` runs the GRPO update of Tunix beside them: the same weights, tokens, loss and machine, in turns.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from _harness import clocked, medians, show
from _profile import profile
from _step_cases import CASES, MODELS, Draw, Groups
from _unmerged import unmerged_forest
from sides.tunix import TunixPeer, named_weights

from forgejax.learner import LossConfig, PackConfig, PackedStep, Sample, StepConfig, make_train_step
from forgejax.learner.packing.forest import Forest
from forgejax.learner.packing.lay import lay_plan
from forgejax.learner.packing.plan import plan_step
from forgejax.models import PolicyConfig, abstract_policy, count_params, init_params
from forgejax.run.rows import Compiles

_PEAK_SIZE = 2048  # of the square product that utilisation is measured against
_ROW_LIMIT = 2048  # tokens of a row, unless one tree is larger
_AGREES = 1e-5  # with the peer, as length of the difference over length of the gradient


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Which samples (left out: all of them, one after another), on which policy.

    ``peer`` also measures Tunix, and asserts that its gradient of the batch is ours; it is installed on the first call.
    ``profile`` shows, instead of the comparison, where the gradient of a merged step spends its time: shares of the
    threads' busy time by part of the model.
    """

    case: str = ""
    model: Literal["tiny", "20m", "135m"] = "20m"
    peer: Literal["none", "tunix"] = "none"
    block_size: int = 64
    vocab_chunk: int = 2048
    repeats: int = 5
    profile: bool = False
    json: bool = False

    @property
    def policy(self) -> PolicyConfig:
        return MODELS[self.model]


def packed(forest: Forest, options: Options) -> PackedStep:
    """One step, in micro-batches of one row of the length that wastes the fewest tokens on padding."""
    block, most = options.block_size, _ROW_LIMIT // options.block_size

    def in_rows_of(blocks: int) -> PackedStep:
        config = PackConfig(row_length=blocks * block, rows=1, block_size=block, trunks=False)
        return lay_plan(plan_step(forest, config), config)

    longest = max(forest.size(*root)[0] for root in forest.roots)
    fewest = -(-longest // block)
    steps = [in_rows_of(blocks) for blocks in range(fewest, max(fewest, most) + 1)]
    return min(steps, key=lambda step: (step.stats.padded_tokens, len(step.batches)))


def merged_forest(samples: Sequence[Sample]) -> Forest:
    """The samples as the product merges them; each trained token weighs the same."""
    return Forest.of(samples, np.full(len(samples), 1 / sum(len(sample.token_ids) for sample in samples)))


def train_flops(options: Options, step: PackedStep) -> float:
    """FLOPs of forward and backward that the model asks for: recomputation and padding are not work."""
    policy = options.policy
    embeddings = (1 if policy.tied_embeddings else 2) * policy.vocab_size * policy.d_model
    weights = count_params(abstract_policy(policy)[1]) - embeddings
    rows = [
        (batch.term_edge_BM[row], batch.term_mask_BM[row])
        for batch in step.batches
        for row in range(len(batch.tokens_BT))
    ]
    edges = sum(len(np.unique(edge[mask])) for edge, mask in rows)
    attention = 4 * policy.num_layers * policy.num_heads * policy.head_size * step.stats.tree_pairs
    return 3.0 * (2 * weights * step.stats.tree_tokens + 2 * policy.d_model * policy.vocab_size * edges + attention)


class Ours:
    """The step of the product, its programs compiled once for gradients and timings alike."""

    def __init__(self, options: Options) -> None:
        # Tunix knows no CISPO: beside it, both have the loss of PPO.
        loss = LossConfig(name="ppo_clip" if options.peer == "tunix" else "cispo")
        config = StepConfig(vocab_chunk=options.vocab_chunk, loss=loss)
        self.params = init_params(options.policy)
        self.step = make_train_step(abstract_policy(options.policy)[0], self.params, config)
        self.begin()

    def begin(self) -> None:
        """Back to the weights of the beginning."""
        self.state = self.step.init(self.params)

    def gradient(self, packed_step: PackedStep) -> dict[str, np.ndarray]:
        return dict(named_weights(self.accumulate(packed_step).grads))

    def update(self, packed_step: PackedStep) -> Any:
        """One optimizer step, as the learner takes it, transfers included."""
        self.state, metrics = self.step.apply(self.state, self.accumulate(packed_step))
        return self.state, metrics

    def compiled(self, packed_step: PackedStep) -> str:
        """The HLO of the program that runs for each micro-batch."""
        accumulate: Any = self.step.accumulate
        weights = self.step.cast(self.state.params)
        return (
            accumulate.lower(weights, self.step.start(weights), packed_step.batches[0], np.int32(0)).compile().as_text()
        )

    def accumulate(self, packed_step: PackedStep) -> Any:
        weights = self.step.cast(self.state.params)
        accumulated = self.step.start(weights)
        for batch in packed_step.batches:
            accumulated = self.step.accumulate(weights, accumulated, jax.device_put(batch), np.int32(0))
        return accumulated


def relative(ours: dict[str, np.ndarray], oracle: dict[str, np.ndarray]) -> float:
    """Length of the difference over length of the oracle, in FP64."""
    wide = [(ours[name].astype(np.float64), oracle[name].astype(np.float64)) for name in sorted(ours | oracle)]
    return float(np.sqrt(sum(np.sum((a - b) ** 2) for a, b in wide) / sum(np.sum(b**2) for _, b in wide)))


def compare(case: str, groups: Groups, options: Options) -> dict[str, Any]:
    """Medians of the merged step, of the unmerged one and of the peer's, taken in turns."""
    samples = list(itertools.chain.from_iterable(groups))
    merged, unmerged = packed(merged_forest(samples), options), packed(unmerged_forest(samples), options)
    ours = Ours(options)
    # Each compiles as the first thing its process does, and while the other's is idle or not there yet.
    first_s = clocked(functools.partial(ours.update, merged))
    ours.begin()
    peer = TunixPeer(options.policy, ours.params, samples) if options.peer == "tunix" else None
    with peer or nullcontext():
        peer_first_s = peer.update() if peer is not None else 0.0
        gradient = ours.gradient(merged)
        result = {"grad_rel_diff": relative(gradient, ours.gradient(unmerged))}
        a = jax.random.normal(jax.random.key(0), (_PEAK_SIZE, _PEAK_SIZE))
        product = functools.partial(jax.jit(jnp.matmul), a, a)
        steps = functools.partial(ours.update, merged), functools.partial(ours.update, unmerged)
        # The faster of two products: the first finds caches and threads as the step left them.
        runs: list[Callable[[], float]] = [functools.partial(clocked, step) for step in steps]
        runs.append(lambda: min(clocked(product), clocked(product)))
        if peer is not None:
            result["peer_grad_rel_diff"] = relative(gradient, peer.gradient())
            if result["peer_grad_rel_diff"] > _AGREES:
                raise SystemExit(f"the peer's gradient of {case} is not ours: {result}")
            runs.append(peer.update)
        for run in runs:
            run()
        counted = Compiles()  # everything has run: a compile from here on is a recompile
        merged_s, unmerged_s, matmul_s, *peer_s = medians(runs, options.repeats)
        result["compiles"] = counted.count
    result |= figures(merged, merged_s, unmerged_s) | {"compile_s": first_s - merged_s}
    result |= {"row_fill_merged": merged.stats.row_fill, "row_fill_unmerged": unmerged.stats.row_fill}
    for seconds in peer_s:
        result |= {
            "peer_s": seconds,
            "peer_compile_s": peer_first_s - seconds,
            "speedup_vs_peer": seconds / merged_s,
            "unmerged_speedup_vs_peer": seconds / unmerged_s,
        }
    peak = 2 * _PEAK_SIZE**3 / matmul_s
    return result | {"matmul_gflops": peak / 1e9, "mfu_vs_matmul": train_flops(options, merged) / merged_s / peak}


def figures(merged: PackedStep, merged_s: float, unmerged_s: float) -> dict[str, Any]:
    """What merging saved. Tokens are those of the merged trees, also where the unmerged step is timed."""
    stats = merged.stats
    return {
        "samples": stats.samples,
        "tree_tokens": stats.tree_tokens,
        "token_ratio": stats.tree_token_ratio,
        "pair_ratio": stats.attention_pair_ratio,
        "merged_s": merged_s,
        "unmerged_s": unmerged_s,
        "speedup": unmerged_s / merged_s,
        "merged_tree_tokens_per_s": stats.tree_tokens / merged_s,
        "merged_sample_tokens_per_s": stats.unmerged_tokens / merged_s,
        "unmerged_sample_tokens_per_s": stats.unmerged_tokens / unmerged_s,
    }


def profiled(groups: Groups, options: Options) -> dict[str, Any]:
    """Shares of the busy time of a merged step's gradient."""
    merged, ours = packed(merged_forest(list(itertools.chain.from_iterable(groups))), options), Ours(options)
    jax.block_until_ready(ours.accumulate(merged))
    return profile(functools.partial(ours.accumulate, merged), ours.compiled(merged))


def main(options: Options) -> None:
    names: Sequence[str] = [options.case] if options.case else list(CASES)
    if unknown := [name for name in names if name not in CASES]:
        raise SystemExit(f"unknown case {unknown[0]!r}: expected one of {', '.join(CASES)}")
    for name in names:
        groups = CASES[name](Draw(options.policy.vocab_size))
        result = profiled(groups, options) if options.profile else compare(name, groups, options)
        show({"case": name, "model": options.model, **result}, options.json)


if __name__ == "__main__":
    main(tyro.cli(Options))
