"""One gradient in two phases, a long trunk once and its leaves behind it, against rows that each repeat the trunk."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import jax
import numpy as np
import tyro
from _harness import seconds, show
from _step_cases import MODELS, Draw, Groups

from forgejax.learner import Learner, PackConfig, PackedStep, StepConfig, pack
from forgejax.models import abstract_policy, init_params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """``members`` answers of ``answer`` tokens to one prompt; the rows of the two phases hold ``row_length`` tokens,
    those that repeat the prompt the shortest multiple of ``block_size`` that holds it and an answer."""

    model: Literal["tiny", "20m", "135m"] = "tiny"
    prompt: int = 2048
    members: int = 8
    answer: int = 512
    row_length: int = 2048
    block_size: int = 64
    vocab_chunk: int = 2048
    repeats: int = 3
    json: bool = False

    @property
    def long_row(self) -> int:
        return -(-(self.prompt + self.answer) // self.block_size) * self.block_size


def packed(groups: Groups, options: Options, row_length: int, *, trunks: bool) -> PackedStep:
    config = PackConfig(row_length=row_length, rows=1, block_size=options.block_size, trunks=trunks)
    return pack(groups, config)


def relative(ours: Any, oracle: Any) -> float:
    """Length of the difference over length of the oracle, in FP64."""

    def length(tree: Any) -> float:
        return float(np.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in jax.tree.leaves(tree))))

    ours, oracle = jax.device_get((ours, oracle))
    return length(jax.tree.map(np.subtract, ours, oracle)) / length(oracle)


def main(options: Options) -> None:
    policy = MODELS[options.model]
    learner = Learner(abstract_policy(policy)[0], init_params(policy), StepConfig(vocab_chunk=options.vocab_chunk))
    groups = Draw(policy.vocab_size).grpo(options.prompt, options.members, options.answer)
    two_phase = packed(groups, options, options.row_length, trunks=True)
    repeated = packed(groups, options, options.long_row, trunks=False)
    gradients = [functools.partial(learner.gradient, step, 0) for step in (two_phase, repeated)]
    difference = relative(*(gradient().grads for gradient in gradients))
    two_phase_s, repeated_s = seconds(*gradients, repeats=options.repeats)
    result = {
        "model": options.model,
        "case": f"trunk {options.prompt}, {options.members} x {options.answer}, rows of {options.row_length}",
        "grad_rel_diff": difference,
        "two_phase_s": two_phase_s,
        "repeated_s": repeated_s,
        "speedup": repeated_s / two_phase_s,
        "trunks": len(two_phase.trunks),
        "leaf_batches": sum(len(trunk.leaves) for trunk in two_phase.trunks),
        "two_phase_tokens": two_phase.stats.tree_tokens,
        "repeated_tokens": repeated.stats.tree_tokens,
        "two_phase_padded": two_phase.stats.padded_tokens,
        "repeated_padded": repeated.stats.padded_tokens,
    }
    show(result, options.json)


if __name__ == "__main__":
    main(tyro.cli(Options))
