"""Our figures of a Hugging Face folder: its logits, and the gradient of a CISPO loss under its own names."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import NDArray
from safetensors.numpy import load_file

from forgejax.learner import PackConfig, Sample, StepConfig, make_train_step, pack
from forgejax.models import PolicyConfig, abstract_policy, export_policy, load_params, read_policy_config
from tests.models.recipe import Tensors
from tests.models.reference import causal

_PACKING = PackConfig(row_length=64, rows=1, block_size=16)


def load(folder: Path) -> tuple[PolicyConfig, Any]:
    """Configuration and weights of a folder, in FP32."""
    config = read_policy_config(folder, base=PolicyConfig(path=str(folder)))
    return config, load_params(config)


def logits(config: PolicyConfig, params: Any, tokens_T: NDArray[np.int32]) -> NDArray[np.float32]:
    """Logits [T, V] of one causal sequence."""
    return np.asarray(_logits(config, params, jnp.asarray(tokens_T)[None]))[0]


@functools.partial(jax.jit, static_argnames="config")
def _logits(config: PolicyConfig, params: Any, tokens_BT: jax.Array) -> jax.Array:
    policy = nnx.merge(abstract_policy(config)[0], params)
    positions_BT = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None]
    return policy.logits(policy(tokens_BT, positions_BT, causal)[0])


def gradients(
    config: PolicyConfig,
    params: Any,
    groups: Sequence[Sequence[Sample]],
    folder: Path,
    out: Path,
) -> tuple[Tensors, float]:
    """The gradient that the learner's merged step takes on these groups, by Hugging Face names, and the loss.

    It is written to ``out`` by what exports weights: a gradient has the same names and shapes.
    """
    step = make_train_step(abstract_policy(config)[0], params, StepConfig(keep="all"))
    total = step.start(params)
    for batch in pack(groups, _PACKING).batches:
        total = step.accumulate(params, total, batch, np.int32(0))
    return exported(config, total.grads, folder, out), float(total.tally.loss)


def exported(config: PolicyConfig, params: Any, folder: Path, out: Path) -> Tensors:
    """The tensors that ``export_policy`` writes for these weights."""
    export_policy(config, params, out, folder)
    return stored(out)


def stored(folder: Path) -> Tensors:
    """All tensors of a folder."""
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def relative(ours: Tensors, theirs: Tensors) -> tuple[float, tuple[str, float]]:
    """Length of the difference over length of theirs, over all tensors; and the name and figure of the worst one.

    A tensor's own relative difference counts where its length exceeds a thousandth of the whole; below that rounding
    of the whole is what one sees.
    """
    lengths = {name: float(np.linalg.norm(value.astype(np.float64))) for name, value in theirs.items()}
    apart = {
        name: float(np.linalg.norm(ours[name].astype(np.float64) - value.astype(np.float64)))
        for name, value in theirs.items()
    }
    whole = float(np.linalg.norm(list(lengths.values())))
    shares = {name: apart[name] / lengths[name] for name in theirs if lengths[name] > 1e-3 * whole}
    worst = max(shares, key=lambda name: shares[name])
    return float(np.linalg.norm(list(apart.values()))) / whole, (worst, shares[worst])
