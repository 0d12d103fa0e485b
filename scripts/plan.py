"""Ranks meshes for a policy, a context and a batch, by count: nothing is compiled, and no weights are needed.

    python scripts/plan.py --config configs/qwen3_8b_v5e64.toml
    python scripts/plan.py --policy examples/shapes/minimax-m2 --context 200704 --chips v5p h200 --most 512

Each mesh is shown with the fastest of the settings that fit it, engines on the mesh itself where they fit, else as
servers elsewhere. Seconds are bounds by the chips' data sheets; `scripts/train.py --dry-run` with the options that are
shown says more of one.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from forgejax.errors import ConfigError, ForgejaxError
from forgejax.models import read_policy_config
from forgejax.run.config import TrainConfig, load_shape
from forgejax.run.plan.chips import prepare_compiler
from forgejax.run.plan.nearest import rank_meshes
from forgejax.run.plan.show import show_choices

ChipName = Literal["v4", "v5e", "v5p", "v6e", "tpu7x", "a100", "l40s", "h100", "h200", "b200", "mi300x"]


@dataclass(frozen=True, kw_only=True)
class Options:
    config: Path = Path("configs/qwen3_8b_v5e64.toml")
    """The run; the options below change it."""
    policy: Path | None = None
    """A folder with a config.json, as examples/shapes/minimax-m2: the policy's shape."""
    context: int | None = None
    """Longest request, and length of a row."""
    batch: int | None = None
    """Rows on each of the parts that split them."""
    chips: tuple[ChipName, ...] = ("v5e", "v6e", "v5p", "h100")
    """Which chips."""
    most: int = 256
    """How many of them at most."""


def main(options: Options) -> None:
    prepare_compiler()
    choices = rank_meshes(_change(load_shape(options.config)[0], options), options.chips, options.most)
    if not choices:
        raise ConfigError(
            f"no mesh of up to {options.most} chips of {', '.join(options.chips)} holds this policy and context; raise "
            "--most, name other --chips, or shorten --context"
        )
    print(show_choices(choices))


def _change(config: TrainConfig, options: Options) -> TrainConfig:
    engine, packing, policy = config.engine, config.packing, config.policy
    if options.policy is not None:
        policy = read_policy_config(options.policy, base=dataclasses.replace(policy, path=""))
    if options.context is not None:
        engine = dataclasses.replace(engine, max_context=options.context, kv_pages=0)
        packing = dataclasses.replace(packing, block_size=0, row_length=options.context)
    if options.batch is not None:
        packing = dataclasses.replace(packing, rows=options.batch)
    tokenizer = config.tokenizer or config.policy.path
    return dataclasses.replace(config, engine=engine, packing=packing, policy=policy, tokenizer=tokenizer)


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except ForgejaxError as error:
        print(f"plan.py: {error}", file=sys.stderr)
        sys.exit(1)
