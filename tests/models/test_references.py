"""Every family against what transformers gave on torch, recorded: weights are drawn again from their names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.models import ours, recorded
from tests.models.recipe import groups, tokens, write_folder

LOGITS = 3e-5
GRADIENT = 1e-4


@pytest.mark.parametrize("family", recorded.families())
def test_logits_are_those_recorded_from_transformers(family: str, tmp_path: Path) -> None:
    reference = recorded.read(family)
    config, params = ours.load(_drawn(reference, tmp_path))

    assert np.abs(ours.logits(config, params, tokens()) - reference.logits_TV).max() <= LOGITS


@pytest.mark.parametrize("family", ["llama3", "qwen2", "qwen3", "qwen3_moe", "minimax_m2"])
def test_gradients_are_those_recorded_from_transformers(family: str, tmp_path: Path) -> None:
    """The learner's merged step, against each sample in a pass of its own; one family of each model type."""
    reference = recorded.read(family)
    folder = _drawn(reference, tmp_path)

    gradients, loss = ours.gradients(*ours.load(folder), groups(), folder, tmp_path / "gradients")

    assert loss == pytest.approx(reference.loss, rel=1e-5)
    assert recorded.apart(recorded.digest(gradients), reference.gradients) <= GRADIENT


def test_figures_are_recorded_for_every_family_and_every_scaling_of_positions() -> None:
    configs = [recorded.read(family).config for family in recorded.families()]
    assert {config["model_type"] for config in configs} == {"llama", "qwen2", "qwen3", "qwen3_moe", "minimax_m2"}
    kinds = {config["rope_parameters"]["rope_type"] for config in configs}
    assert kinds == {"default", "linear", "llama3", "yarn"}


def _drawn(reference: recorded.Recorded, tmp_path: Path) -> Path:
    shapes = {name: each.shape for name, each in reference.gradients.items()}
    return write_folder(tmp_path / "drawn", reference.config, shapes)
