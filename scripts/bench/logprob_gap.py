"""How far trainer and sampler are apart on what the sampler drew, by depth of context, for policies of several kinds.

Requests of many lengths go through the driver as they would in a run: prompts in chunks, some from the prefix cache,
members of a group side by side, then a second turn of each. What comes back is packed, merged and scored by the
learner under the same weights.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import tyro
from _harness import show

from forgejax.learner import Learner, PackConfig, StepConfig, pack
from forgejax.learner.gap import GapFigures, count_by_depth, find_fresh
from forgejax.learner.packing.samples import make_turn_sample
from forgejax.models import MoEConfig, PolicyConfig, abstract_policy, init_params
from forgejax.models.policy import DType
from forgejax.rollout import Driver, EngineConfig, PolicyEngine
from forgejax.types import Completion, SampleRequest, SamplingLaw, Turn

_BASE: dict[str, Any] = {"vocab_size": 4096, "num_layers": 6, "d_model": 256, "d_ff": 512, "tied_embeddings": False}
KINDS = {
    "heads of 64": PolicyConfig(num_heads=4, num_kv_heads=2, head_dim=64, **_BASE),
    "heads of 128": PolicyConfig(num_heads=4, num_kv_heads=2, head_dim=128, qk_norm="head", **_BASE),
    "mixture": PolicyConfig(
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        qk_norm="head",
        moe=MoEConfig(num_experts=16, experts_per_token=4, d_ff=128),
        **_BASE,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure. Weights are random."""

    dtypes: tuple[DType, ...] = ("float32", "bfloat16")
    prompts: tuple[int, ...] = (20, 100, 500, 1000, 4000, 7900)  # tokens
    members: int = 4  # requests that share a prompt
    turn_tokens: int = 48
    json: bool = False


def sample(driver: Driver, options: Options, vocab_size: int) -> list[Completion]:
    """Two turns of every member of every group."""
    rng, law = np.random.default_rng(0), SamplingLaw()

    def serve(prompts: list[np.ndarray], turn: int) -> list[Completion]:
        futures = [
            driver.submit(
                SampleRequest(
                    request_id=f"{turn}-{number}",
                    prompt_ids=prompt.astype(np.int32),
                    max_tokens=options.turn_tokens,
                    seed=number,
                    law=law,
                )
            )
            for number, prompt in enumerate(prompts)
        ]
        return [future.result() for future in futures]

    texts = [rng.integers(0, vocab_size, length) for length in options.prompts]
    first = serve([text for text in texts for _ in range(options.members)], 1)
    said = [np.concatenate([each.prompt_ids, each.token_ids, rng.integers(0, vocab_size, 7)]) for each in first]
    return first + serve(said, 2)


def measure(policy: PolicyConfig, options: Options) -> dict[str, GapFigures]:
    """The gap by depth of one policy."""
    room = -(-(max(options.prompts) + 2 * options.turn_tokens + 64) // 64) * 64
    params = init_params(policy)
    engine = PolicyEngine(policy, EngineConfig(slots=8, max_context=room))
    with Driver(engine, params) as driver:
        completions = sample(driver, options, policy.vocab_size)
    law = SamplingLaw()
    samples = [
        make_turn_sample(
            Turn(index=0, completion=each, parent=None, requested_at=0.0, finished_at=0.0, requested_law=law), 1.0
        )
        for each in completions
    ]
    packed = pack([samples], PackConfig(row_length=2 * room, rows=1, block_size=64))
    learner = Learner(abstract_policy(policy)[0], params, StepConfig(keep="nothing"))
    return count_by_depth({}, *find_fresh([np.asarray(scores) for scores in learner.score(packed)], packed, 0))


def main(options: Options) -> None:
    result: dict[str, Any] = {}
    for kind, policy in KINDS.items():
        for dtype in options.dtypes:
            bands = measure(dataclasses.replace(policy, param_dtype=dtype, compute_dtype=dtype), options)
            for depth, gap in bands.items():
                figures = {"mean": gap.mean, "p99": gap.p99, "max": gap.largest, "ess": gap.ess, "tokens": gap.tokens}
                result |= {f"{kind}, {dtype}, {depth}: {name}": value for name, value in figures.items()}
    show(result, options.json)


if __name__ == "__main__":
    main(tyro.cli(Options))
