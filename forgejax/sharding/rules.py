"""Logical axes to mesh axes: every partition decision, in one place.

Weights and activations name what a dimension *is* (``heads``, ``mlp``, ``rows``); ``Rules`` says which mesh axes split
it. Weights carry their names as ``logical_axes`` metadata on their ``nnx.Variable``.
"""

from __future__ import annotations

import dataclasses

from forgejax.errors import ConfigError, MeshError
from forgejax.sharding.topology import AXES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """For each logical axis, the mesh axes that split it, major first; an empty tuple replicates it."""

    vocab: tuple[str, ...] = ("tensor",)
    embed: tuple[str, ...] = ("fsdp", "context")
    heads: tuple[str, ...] = ("tensor",)
    kv_heads: tuple[str, ...] = ("tensor",)
    head_dim: tuple[str, ...] = ()
    mlp: tuple[str, ...] = ("tensor",)
    experts: tuple[str, ...] = ("expert",)
    expert_mlp: tuple[str, ...] = ("tensor",)  # the width of each expert
    router: tuple[str, ...] = ()  # the scores of all experts, by which each device chooses for its own tokens
    layers: tuple[str, ...] = ()
    norm: tuple[str, ...] = ()
    rows: tuple[str, ...] = ("data", "fsdp", "expert")  # B of a packed batch
    draws: tuple[str, ...] = ("expert", "tensor")  # S of the logits that an engine draws from
    length: tuple[str, ...] = ("context",)  # T of a packed batch
    kept: tuple[str, ...] = ("context", "tensor")  # T of the input that a layer keeps, where devices keep shares of it

    def __post_init__(self) -> None:
        for name, axes in dataclasses.asdict(self).items():
            unknown = [axis for axis in axes if axis not in AXES]
            if unknown or len(set(axes)) != len(axes):
                raise ConfigError(f"rules.{name} is {list(axes)}; expected distinct axes of {', '.join(AXES)}")

    def axes(self, logical: str | None) -> tuple[str, ...]:
        """The mesh axes of a logical axis; None is a dimension that nothing splits."""
        if logical is None:
            return ()
        if logical not in self.__dataclass_fields__:
            known = ", ".join(self.__dataclass_fields__)
            raise MeshError(f"unknown logical axis {logical!r}; expected one of {known}")
        axes: tuple[str, ...] = getattr(self, logical)
        return axes
