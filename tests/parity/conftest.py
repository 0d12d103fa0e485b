"""Each family once, as transformers has it and as we read it, for all tests of this folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from models.recipe import groups, tokens
from transformers.utils import logging

from forgejax.models import PolicyConfig
from models import ours

from .transformers_side import FAMILIES, Figures, figures, make_folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A family's folder, what transformers gives for it, and our policy read from it."""

    family: str
    folder: Path
    theirs: Figures
    config: PolicyConfig
    params: Any


def pytest_configure() -> None:
    torch.set_num_threads(1)  # sums in one order on every machine
    logging.disable_progress_bar()


@pytest.fixture(scope="session", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp(request.param) / "model"
    model = make_folder(request.param, folder)
    config, params = ours.load(folder)
    return Case(
        family=request.param,
        folder=folder,
        theirs=figures(model, folder, tokens(), groups()),
        config=config,
        params=params,
    )
