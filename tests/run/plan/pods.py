"""Configurations of pods, planned without a device."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

from forgejax.models import PolicyConfig
from forgejax.run.config import TrainConfig, load_shape

ROOT = Path(__file__).parents[3]
POD = ROOT / "configs/qwen3_8b_v5e64.toml"


@functools.cache
def load_pod(*options: str) -> TrainConfig:
    """Qwen3-8B on a v5e-64, with these options."""
    return load_shape(POD, [*options, f"--tokenizer={ROOT / 'examples/quickstart/tokenizer'}"])[0]


def of_policy(config: TrainConfig, **shape: Any) -> TrainConfig:
    """The same run of another shape."""
    policy = PolicyConfig(param_dtype="bfloat16", compute_dtype="bfloat16", **shape)
    return dataclasses.replace(config, policy=policy)
