"""Recorded figures of the families, one small JSON file each, made by ``scripts/make_references.py``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.models.recipe import Tensors, generator

_FOLDER = Path(__file__).parent / "references"
_SMALL = 1e-3
"""Gradients shorter than this share of the whole are held to the rounding of a tensor of that share."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Digest:
    """A gradient in two numbers: its length, and its product with ``recipe.generator("projection of NAME")``'s normal
    numbers, which a transposed or permuted tensor does not keep."""

    shape: tuple[int, ...]
    norm: float
    projection: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recorded:
    """What transformers gives for a family.

    Attributes:
        config: its ``config.json``.
        loss: the CISPO loss of ``recipe.groups()``.
        gradients: of that loss, by stored name: all tensors of the folder.
        logits_TV: of ``recipe.tokens()``.
    """

    config: Mapping[str, Any]
    loss: float
    gradients: Mapping[str, Digest]
    logits_TV: NDArray[np.float32]


def families() -> list[str]:
    """The names that figures are recorded for."""
    return sorted(file.stem for file in _FOLDER.glob("*.json"))


def digest(gradients: Tensors) -> dict[str, Digest]:
    """The gradients in short, by name."""
    return {name: _digest(name, gradients[name].astype(np.float64)) for name in sorted(gradients)}


def _digest(name: str, gradient: NDArray[np.float64]) -> Digest:
    direction = generator(f"projection of {name}").standard_normal(gradient.shape)
    return Digest(
        shape=gradient.shape, norm=float(np.linalg.norm(gradient)), projection=float((gradient * direction).sum())
    )


def apart(ours: Mapping[str, Digest], theirs: Mapping[str, Digest]) -> float:
    """The largest difference of two numbers of a gradient, as a share of its length (see ``_SMALL``)."""
    if ours.keys() != theirs.keys():
        raise ValueError(f"gradients of other tensors: {sorted(ours.keys() ^ theirs.keys())}")
    least = _SMALL * float(np.linalg.norm([each.norm for each in theirs.values()]))
    return max(
        max(abs(ours[name].norm - each.norm), abs(ours[name].projection - each.projection)) / max(each.norm, least)
        for name, each in theirs.items()
    )


def read(family: str) -> Recorded:
    told = json.loads((_FOLDER / f"{family}.json").read_text())
    return Recorded(
        config=told["config"],
        loss=told["loss"],
        gradients={
            name: Digest(shape=tuple(shape), norm=norm, projection=projection)
            for name, (shape, norm, projection) in told["gradients"].items()
        },
        logits_TV=np.array(told["logits"], np.float32),
    )


def write(family: str, recorded: Recorded) -> Path:
    """Writes a family's file, a tensor or a token to a line."""
    config = json.dumps(recorded.config, sort_keys=True, indent=1)
    gradients = ",\n".join(
        f'"{name}": [{list(each.shape)}, {each.norm:.8g}, {each.projection:.8g}]'
        for name, each in sorted(recorded.gradients.items())
    )
    logits = ",\n".join(f"[{', '.join(f'{value:.7g}' for value in row)}]" for row in recorded.logits_TV)
    path = _FOLDER / f"{family}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        f'{{"config": {config},\n"loss": {recorded.loss:.8g},\n"gradients": {{\n{gradients}\n}},\n'
        f'"logits": [\n{logits}\n]}}\n'
    )
    return path
