"""Every family against what transformers gave on torch, recorded: weights are drawn again from their names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from . import ours, recorded
from .recipe import groups, tokens, write_folder

LOGITS = 3e-5
GRADIENT = 1e-4


@pytest.mark.parametrize("family", recorded.families())
def test_logits_and_gradients_are_those_recorded_from_transformers(family: str, tmp_path: Path) -> None:
    reference = recorded.read(family)
    shapes = {name: each.shape for name, each in reference.gradients.items()}
    folder = write_folder(tmp_path / "drawn", reference.config, shapes)
    config, params = ours.load(folder)

    logits = ours.logits(config, params, tokens())
    gradients, loss = ours.gradients(config, params, groups(), folder, tmp_path / "gradients")

    assert np.abs(logits - reference.logits_TV).max() <= LOGITS
    assert loss == pytest.approx(reference.loss, rel=1e-5)
    assert recorded.apart(recorded.digest(gradients), reference.gradients) <= GRADIENT


def test_figures_are_recorded_for_every_family_and_every_scaling_of_positions() -> None:
    configs = [recorded.read(family).config for family in recorded.families()]
    assert {config["model_type"] for config in configs} == {"llama", "qwen2", "qwen3", "qwen3_moe", "minimax_m2"}
    kinds = {config["rope_parameters"]["rope_type"] for config in configs}
    assert kinds == {"default", "linear", "llama3", "yarn"}
