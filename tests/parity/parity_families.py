"""Every family against transformers on torch: logits, merged gradients, and the way in and out.

``make parity`` runs these files; their names keep them out of ``make test``, which needs no torch.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from forgejax.models import PolicyConfig
from tests.models.ours import exported, gradients, load, logits, relative, stored
from tests.models.recipe import groups, tokens
from tests.models.recorded import apart, digest, read
from tests.models.test_references import LOGITS
from tests.parity.transformers_side import FAMILIES, Figures, figures, load_model, make_folder
from tests.parity.transformers_side import logits as torch_logits

WHOLE, TENSOR = 2e-5, 1e-4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A family's folder, what transformers gives for it, and our policy read from it."""

    family: str
    folder: Path
    theirs: Figures
    config: PolicyConfig
    params: Any


@pytest.fixture(scope="session", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp(request.param) / "model"
    model = make_folder(request.param, folder)
    config, params = load(folder)
    return Case(
        family=request.param,
        folder=folder,
        theirs=figures(model, folder, tokens(), groups()),
        config=config,
        params=params,
    )


def test_logits_are_those_of_transformers(case: Case) -> None:
    difference = float(np.abs(logits(case.config, case.params, tokens()) - case.theirs.logits_TV).max())
    print(f"{case.family}: max |logit difference| {difference:.1e}")

    assert case.theirs.logits_TV.std() > 1.0
    assert difference <= LOGITS


def test_merged_gradients_are_those_of_torch_unmerged(case: Case, tmp_path: Path) -> None:
    """CISPO on episodes that share prefixes; no token of any sample lies near a tie between experts."""
    terms = sum(len(sample.token_ids) for members in groups() for sample in members)
    assert case.theirs.margin > 1e-4
    assert 0 < case.theirs.clipped < terms

    merged, loss = gradients(case.config, case.params, groups(), case.folder, tmp_path / "gradients")

    whole, worst = relative(merged, case.theirs.gradients)
    print(f"{case.family}: gradient apart by {whole:.1e}, {worst[0]} by {worst[1]:.1e}")
    assert loss == pytest.approx(case.theirs.loss, rel=1e-5)
    assert whole <= WHOLE
    assert worst[1] <= TENSOR, worst[0]


def test_in_out_and_in_again_changes_no_bit_and_no_logit(case: Case, tmp_path: Path) -> None:
    kept, written = stored(case.folder), exported(case.config, case.params, case.folder, tmp_path / "out")

    assert written.keys() == kept.keys()
    for name, value in kept.items():
        np.testing.assert_array_equal(written[name], value, err_msg=name)
    config, params = load(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, params, case.params)
    theirs = load_model(tmp_path / "out")
    np.testing.assert_array_equal(torch_logits(theirs, tokens()), torch_logits(load_model(case.folder), tokens()))
    np.testing.assert_allclose(torch_logits(theirs, tokens()), case.theirs.logits_TV, atol=1e-6)
    assert config.path == str(tmp_path / "out")


def test_what_is_recorded_for_make_test_is_what_transformers_gives(case: Case) -> None:
    """Otherwise run ``scripts/make_references.py``."""
    kept = read(case.family)

    assert kept.config == case.theirs.config
    assert {name: each.shape for name, each in kept.gradients.items()} == case.theirs.shapes
    np.testing.assert_allclose(kept.logits_TV, case.theirs.logits_TV, atol=1e-5)
    assert apart(digest(case.theirs.gradients), kept.gradients) <= TENSOR
