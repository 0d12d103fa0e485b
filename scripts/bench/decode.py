"""The engine's tokens per second, in decode, in prefill and as served to groups, beside what the machine allows."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from _harness import matmul_flops, seconds, show

from forgejax.models import PolicyConfig, count_params, init_params
from forgejax.rollout import Driver, EngineConfig, PolicyEngine
from forgejax.rollout.engine.settings import SlotSettings
from forgejax.rollout.engine.slots import Slots
from forgejax.rollout.engine.weights import WeightBox
from forgejax.types import SampleRequest

MODELS = {
    "tiny": PolicyConfig(vocab_size=640),
    "20m": PolicyConfig(vocab_size=8192, num_layers=8, d_model=384, num_heads=6, num_kv_heads=2, d_ff=1024),
    "135m": PolicyConfig(vocab_size=49152, num_layers=30, d_model=576, num_heads=9, num_kv_heads=3, d_ff=1536),
}
_COPIED_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure. Weights are random; ``135m`` has the shape of SmolLM2-135M."""

    model: Literal["tiny", "20m", "135m"] = "tiny"
    slots: tuple[int, ...] = (8, 32, 64)
    prompt_tokens: int = 70
    answer_tokens: int = 20
    group_size: int = 8  # requests that share a prompt
    tokens_per_step: int = 4
    max_context: int = 256
    repeats: int = 3
    json: bool = False


class Decoding:
    """An engine with every slot busy behind a prompt."""

    def __init__(self, engine: PolicyEngine, weights: WeightBox, prompt: np.ndarray):
        self.engine, self.weights = engine, weights
        self.prompt = prompt
        self.state: Slots = engine.init_decode_state()
        prefix = engine.prefill(params=weights, padded_tokens=prompt, true_length=len(prompt))
        for slot in range(engine.config.slots):
            settings = SlotSettings(budget=engine.config.max_context, seed=slot)
            self.state = engine.insert(prefix, self.state, slot, settings)

    def prefill(self) -> None:
        self.engine.prefill(params=self.weights, padded_tokens=self.prompt, true_length=len(self.prompt))
        self.state.wait()

    def step(self) -> jax.Array:
        self.state, result = self.engine.generate(self.weights, self.state)
        drawn: jax.Array = result.data
        return drawn


def served_tokens(engine: PolicyEngine, params: Any, options: Options) -> dict[str, float]:
    """Groups that fill the slots twice, through the driver: sampled tokens per second, all costs included."""
    rng = np.random.default_rng(1)
    groups = max(1, 2 * engine.config.slots // options.group_size)
    with Driver(engine, params) as driver:
        for round_ in ("compile", "timed"):
            before = driver.metrics()
            prompts = rng.integers(0, engine.policy.vocab_size, (groups, options.prompt_tokens)).astype(np.int32)
            started = time.perf_counter()
            futures = [
                driver.submit(
                    SampleRequest(
                        request_id=f"{round_}-{group}-{member}",
                        prompt_ids=prompts[group],
                        max_tokens=options.answer_tokens,
                        seed=member,
                    )
                )
                for group in range(groups)
                for member in range(options.group_size)
            ]
            sampled = sum(len(future.result().token_ids) for future in futures)
            taken = time.perf_counter() - started
            after = driver.metrics()
    hits = (after.cached_tokens - before.cached_tokens) / (after.prompt_tokens - before.prompt_tokens)
    return {"served_tok_s": sampled / taken, "prompt_tokens_cached": hits}


def copied_bytes_per_s() -> float:
    """Bytes read and written per second by copying an array far larger than the caches."""
    source = jnp.ones(_COPIED_BYTES // 4)
    copy = jax.jit(jnp.copy)
    return 2 * _COPIED_BYTES / seconds(lambda: copy(source))[0]


def measure(options: Options, params: Any, slots: int, flops: float, bandwidth: float) -> dict[str, float]:
    policy = MODELS[options.model]
    config = EngineConfig(slots=slots, max_context=options.max_context, tokens_per_step=options.tokens_per_step)
    engine = PolicyEngine(policy, config)
    prompt = np.random.default_rng(0).integers(0, policy.vocab_size, options.prompt_tokens).astype(np.int32)
    weights = engine.load_params(params)
    decoding = Decoding(engine, weights, prompt)
    step_s, prefill_s = seconds(decoding.step, decoding.prefill, repeats=options.repeats)
    drawn = slots * options.tokens_per_step
    count = count_params(params)
    # A token reads each weight once and uses it in one product and one sum; the step reads all weights and all KV.
    kv = 2 * policy.num_layers * policy.num_kv_heads * policy.head_size * 4 * slots * options.prompt_tokens
    return {
        "decode_tok_s": drawn / step_s,
        "prefill_tok_s": len(prompt) / prefill_s,
        **served_tokens(engine, params, options),
        "limit_flops_tok_s": flops / (2 * count),
        "limit_bytes_tok_s": slots * bandwidth / (4 * count + kv),
    }


def main(options: Options) -> None:
    params = init_params(MODELS[options.model])
    flops, bandwidth = matmul_flops(), copied_bytes_per_s()
    result: dict[str, Any] = {"model": options.model, "params": count_params(params)}
    result |= {"matmul_gflops": flops / 1e9, "copy_gb_s": bandwidth / 1e9}
    for slots in options.slots:
        figures = measure(options, params, slots, flops, bandwidth)
        result |= {f"s{slots}_{name}": figure for name, figure in figures.items()}
    show(result, options.json)


if __name__ == "__main__":
    main(tyro.cli(Options))
