"""The policies that programs are compiled for, and what a chip has for them."""

from __future__ import annotations

import dataclasses

from forgejax.models import PolicyConfig
from forgejax.models.moe import MoEConfig

GIB = 2**30
USABLE = 15.75 * GIB  # of the 16 GiB of a v5e: past it the compiler itself refuses
COLLECTIVES = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
QWEN3_8B = PolicyConfig(
    vocab_size=151_936,
    num_layers=36,
    d_model=4096,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    d_ff=12_288,
    tied_embeddings=False,
    qk_norm="head",
    param_dtype="bfloat16",
    compute_dtype="bfloat16",
)
QWEN3_30B_A3B = dataclasses.replace(
    QWEN3_8B,
    num_layers=48,
    d_model=2048,
    num_kv_heads=4,
    d_ff=768,
    moe=MoEConfig(num_experts=128, experts_per_token=8, d_ff=768),
)
