"""Writes the policy of a run as a Hugging Face folder.

    python scripts/export.py runs/quickstart-1 --step 100 --out exported

A policy that came from a folder (``policy.path``) keeps its family, the rest of its config.json and its tokenizer; one
that was trained from scratch becomes the plainest family that can hold it. A trainer may be at work on the run.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from forgejax.chat import ChatFormat
from forgejax.errors import ForgejaxError
from forgejax.models import abstract_policy, export_policy
from forgejax.run import rundir
from forgejax.run.checkpoint import load_trained
from forgejax.run.config import TrainConfig, load_saved


@dataclass(frozen=True, kw_only=True)
class Options:
    run: tyro.conf.Positional[Path]
    """The run's folder."""
    out: Path
    """The folder that is made; it must not exist."""
    step: int | None = None
    """The checkpoint's step; the newest if left out."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """What the weights are written in: that of the policy if left out, which is what ran."""


def main(options: Options) -> None:
    config = load_saved(rundir.saved_config(options.run), str(options.run))
    policy = dataclasses.replace(config.policy, param_dtype=options.dtype or config.policy.param_dtype)
    step, params = load_trained(rundir.checkpoints_of(options.run), options.step, abstract_policy(policy)[1])
    export_policy(
        policy,
        params,
        options.out,
        Path(config.policy.path) if config.policy.path else None,
        tokenizer=Path(config.tokenizer_folder),
        extra=settings_of(config),
    )
    print(f"{options.out}: the policy of {options.run} after step {step}")


def settings_of(config: TrainConfig) -> dict[str, Any]:
    """What servers read of a policy that came from no folder: where it stops, and how far it can look."""
    chat = ChatFormat.load(config.tokenizer_folder)
    return {
        "max_position_embeddings": config.engine.max_context,
        "bos_token_id": None,
        "eos_token_id": sorted(chat.stop_ids),
        "pad_token_id": chat.end_of_turn_id,
    }


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except ForgejaxError as error:
        print(f"export: {error}", file=sys.stderr)
        sys.exit(1)
