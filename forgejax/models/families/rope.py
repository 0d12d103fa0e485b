"""Rotary embeddings in a config.json: ``rope_parameters``, or the older ``rope_theta`` with ``rope_scaling``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from forgejax.errors import ConfigError
from forgejax.models.rope import RopeConfig

# For each kind of scaling: its keys in a config.json, and the RopeConfig field each one fills.
_FIELDS: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position_embeddings": "original_positions",
    },
    "yarn": {
        "factor": "factor",
        "original_max_position_embeddings": "original_positions",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "attention_factor": "attention_factor",
        "truncate": "truncate",
    },
}
_REQUIRED = {"factor", "low_freq_factor", "high_freq_factor"}
_ELSEWHERE = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


def read_rope(settings: Mapping[str, Any], head_dim: int, default_theta: float, partial: bool) -> RopeConfig:
    """The rotary embedding a config.json asks for.

    ``partial`` says whether the family may rotate a part of each head: ``rotary_dim`` or ``partial_rotary_factor``.

    Raises:
        ConfigError: an unknown kind of scaling, a key that its kind lacks or does not know, a part where the family
            rotates whole heads.
    """
    new, old = _table(settings, "rope_parameters"), _table(settings, "rope_scaling")
    spec = {**new, **old}
    kind = spec.get("rope_type", spec.get("type", "default"))
    if kind not in _FIELDS:
        raise ConfigError(f"its rope_type is {kind!r}; supported: {', '.join(_FIELDS)}")
    known = _FIELDS[kind]
    for key, value in spec.items():
        if key not in known and key not in _ELSEWHERE and value is not None and kind != "default":
            raise ConfigError(f"its rope key {key} is {value!r}; with rope_type {kind!r} supported: {', '.join(known)}")
    for key in known:
        if key in _REQUIRED and spec.get(key) is None:
            raise ConfigError(f"its rope_type is {kind!r} without {key}; give all of: {', '.join(known)}")
    fields = {field: spec[key] for key, field in known.items() if spec.get(key) is not None}
    if "original_max_position_embeddings" in known:
        fields.setdefault("original_positions", settings.get("max_position_embeddings", 0))
    return RopeConfig(
        theta=float(spec.get("rope_theta", settings.get("rope_theta", default_theta))),
        rotary_dim=_rotary_dim(settings, spec, head_dim, partial),
        scaling="none" if kind == "default" else kind,
        **fields,
    )


def write_rope(rope: RopeConfig, head_dim: int, partial: bool) -> dict[str, Any]:
    """The keys of a config.json, in the new spelling and in the one that older servers read."""
    kind = "default" if rope.scaling == "none" else rope.scaling
    scaling: dict[str, Any] = {key: getattr(rope, field) for key, field in _FIELDS[kind].items()}
    if not rope.attention_factor:
        scaling.pop("attention_factor", None)
    parameters = {"rope_type": kind, "rope_theta": rope.theta, **scaling}
    settings: dict[str, Any] = {
        "rope_parameters": parameters,
        "rope_theta": rope.theta,
        "rope_scaling": {"rope_type": kind, **scaling} if scaling else None,
    }
    if partial and rope.rotary_dim not in (0, head_dim):
        parameters["partial_rotary_factor"] = settings["partial_rotary_factor"] = rope.rotary_dim / head_dim
        settings["rotary_dim"] = rope.rotary_dim
    return settings


def _table(settings: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    table = settings.get(key) or {}
    if not isinstance(table, Mapping) or any(isinstance(value, Mapping) for value in table.values()):
        raise ConfigError(f"its {key} is {table!r}; supported: one flat table for all layers")
    return table


def _rotary_dim(settings: Mapping[str, Any], spec: Mapping[str, Any], head_dim: int, partial: bool) -> int:
    """The rotated part of a head; 0 for all of it."""
    factor = spec.get("partial_rotary_factor", settings.get("partial_rotary_factor"))
    if factor is None and partial and settings.get("rotary_dim"):
        factor = settings["rotary_dim"] / head_dim
    if factor is None or factor == 1:
        return 0
    if not partial:
        raise ConfigError(f"its partial_rotary_factor is {factor}; supported by this family: 1 (whole heads)")
    return round(head_dim * factor)
