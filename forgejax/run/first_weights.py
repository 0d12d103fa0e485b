"""The weights that a run begins with, before any warm start."""

from __future__ import annotations

from forgejax.models import Params, init_params, load_params
from forgejax.run.config import TrainConfig
from forgejax.sharding import Layout


def find_first_weights(config: TrainConfig, layout: Layout, *, fresh: bool) -> Params:
    """Those in ``policy.path``, or random ones; a run that goes on only needs arrays to restore into.

    Raises ForgejaxError for weights that cannot be loaded.
    """
    if fresh and config.policy.path:
        return load_params(config.policy, layout)
    return init_params(config.policy, layout, config.run.seed)
