"""The families of open-weight models: one small file each, and the registry."""

from __future__ import annotations

from forgejax.errors import ConfigError
from forgejax.models.families.base import Family, Settings, Tensor
from forgejax.models.families.llama import LLAMA
from forgejax.models.families.minimax_m2 import MINIMAX_M2
from forgejax.models.families.qwen2 import QWEN2
from forgejax.models.families.qwen3 import QWEN3
from forgejax.models.families.qwen3_moe import QWEN3_MOE
from forgejax.models.policy import PolicyConfig

FAMILIES = (LLAMA, QWEN2, QWEN3, QWEN3_MOE, MINIMAX_M2)
"""The plainest first: a policy that came from no folder is written as the first that can hold it."""


def family_of(settings: Settings) -> Family:
    """The family a config.json names, by ``architectures`` or ``model_type``. Raises ConfigError."""
    architectures, model_type = settings.get("architectures") or [], settings.get("model_type")
    for family in FAMILIES:
        if family.architecture in architectures or (not architectures and family.model_type == model_type):
            return family
    known = ", ".join(f"{family.architecture} ({family.model_type})" for family in FAMILIES)
    raise ConfigError(f"its architectures are {architectures} and its model_type is {model_type!r}; supported: {known}")


def family_for(config: PolicyConfig) -> Family:
    """The plainest family that can hold this policy. Raises ConfigError where none can."""
    for family in FAMILIES:
        if family.holds(config):
            return family
    raise ConfigError(
        f"no family can hold this policy: attention_bias={config.attention_bias}, qk_norm={config.qk_norm!r}, "
        f"rope={config.rope}, moe={config.moe}; known: {', '.join(family.model_type for family in FAMILIES)}"
    )


__all__ = ["FAMILIES", "Family", "Settings", "Tensor", "family_for", "family_of"]
