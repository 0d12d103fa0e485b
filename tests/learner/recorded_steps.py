"""The first steps of a quickstart, recorded: what agents sampled then, and what training on it gave.

``quickstart.groups`` holds the groups of five steps, with the log-probabilities that fresh weights give to their tokens
in place of those recorded: training begins on the policy that is said to have drawn them. ``quickstart.json`` holds
what came of each step, floats by their bits. ``scripts/record_steps.py`` makes both.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import msgspec
import numpy as np

from forgejax.learner import Learner, PackGroups
from forgejax.learner.packing.batch import PackedStep
from forgejax.models import abstract_policy, init_params
from forgejax.pool.codec import decode_group, encode_group
from forgejax.run.config import TrainConfig, load_config
from forgejax.types import Group

FOLDER = Path(__file__).parent / "recorded"
_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True)
class RecordedStep:
    """``packed`` is the digest of all arrays of the step; ``loss`` and ``grad_norm`` are written by ``float.hex``."""

    packed: str
    loss: str
    grad_norm: str


@dataclass(frozen=True, kw_only=True)
class Recording:
    """The steps, and the machine whose rounding they have."""

    machine: str
    steps: tuple[RecordedStep, ...]


def read_recording() -> Recording:
    return msgspec.json.decode((FOLDER / "quickstart.json").read_bytes(), type=Recording)


def write_recording(recording: Recording) -> None:
    encoded = msgspec.json.format(msgspec.json.encode(recording), indent=2)
    (FOLDER / "quickstart.json").write_bytes(encoded + b"\n")


def read_groups() -> list[list[Group]]:
    """The groups of each step."""
    steps = msgspec.msgpack.decode(zlib.decompress((FOLDER / "quickstart.groups").read_bytes()))
    return [[decode_group(payload, index=index) for index, payload in groups] for groups in steps]


def write_groups(steps: Sequence[Sequence[Group]]) -> None:
    encoded = [[[group.dispatch.index, encode_group(group)] for group in groups] for groups in steps]
    (FOLDER / "quickstart.groups").write_bytes(zlib.compress(msgspec.msgpack.encode(encoded), 9))


def quickstart() -> TrainConfig:
    return load_config(_ROOT / "configs" / "quickstart.toml")


def fresh_learner(config: TrainConfig) -> Learner:
    """The quickstart's policy as it is before any training, on one device."""
    graphdef, _ = abstract_policy(config.policy)
    return Learner(graphdef, init_params(config.policy, seed=0), config.step.ending_at(config.run.steps))


def train_on(learner: Learner, config: TrainConfig, steps: Sequence[Sequence[Group]]) -> tuple[RecordedStep, ...]:
    """One update for each step's groups."""
    pack_groups = PackGroups(credit=config.credit, packing=config.packing, row_shards=learner.row_shards)
    found = []
    for version, groups in enumerate(steps):
        packed = pack_groups(groups).packed
        metrics = learner.update(packed, version)
        found.append(
            RecordedStep(
                packed=digest(packed),
                loss=float(metrics["loss"]).hex(),
                grad_norm=float(metrics["grad_norm"]).hex(),
            )
        )
    return tuple(found)


def digest(packed: PackedStep) -> str:
    """Of the bytes of every array of the step."""
    leaves = [np.ascontiguousarray(leaf).tobytes() for part in packed.parts for leaf in jax.tree.leaves(part.batch)]
    return hashlib.sha256(b"".join(leaves)).hexdigest()


def this_machine() -> str:
    """What the last bits of a float depend on: the processor's kind and the compiler's version."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    told = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    model = " ".join(told.get(key, "?") for key in ("vendor_id", "cpu family", "model", "stepping"))
    return f"{platform.machine()} {model} jaxlib {importlib.metadata.version('jaxlib')}"
