"""Records what transformers on torch gives for every family, for the tests that run without torch.

    make parity && .venv-parity/bin/python scripts/make_references.py

It writes tests/models/references/FAMILY.json: configuration, logits, and each gradient's length and projection.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests.models.recipe import groups, tokens
from tests.models.recorded import Recorded, digest, write
from tests.parity.transformers_side import FAMILIES, figures, make_folder


def main() -> None:
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary, "model")
            theirs = figures(make_folder(family, folder), folder, tokens(), groups())
        recorded = Recorded(
            config=theirs.config, loss=theirs.loss, gradients=digest(theirs.gradients), logits_TV=theirs.logits_TV
        )
        path = write(family, recorded)
        print(f"{path}: router margin {theirs.margin:.1e}, {theirs.clipped} ratios clipped")


if __name__ == "__main__":
    main()
