"""Other meshes and settings for the same policy and context: the nearest that fits, and a ranking of all."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from forgejax.errors import ForgejaxError
from forgejax.run.config import TrainConfig
from forgejax.run.plan.chips import count_host_devices
from forgejax.run.plan.footprint import Footprint
from forgejax.run.plan.needs import choose_kept_of
from forgejax.run.plan.residents import Site
from forgejax.run.plan.work import Rows, Work, count_micro_batch, count_update
from forgejax.sharding import CHIPS, Chip, EngineMesh, MeshConfig, MeshPlan, resolve

_MOST_TIMES = 8
_ELSEWHERE = ("http://HOST:8800",)
_TIGHT = 1.0  # GiB of activations, where more do not fit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """Settings that fit, and what they change: options of ``scripts/train.py``."""

    options: tuple[str, ...]
    footprint: Footprint

    @property
    def plan(self) -> MeshPlan:
        return self.footprint.site.plan

    @property
    def step_seconds(self) -> float | None:
        """The bound of one full micro-batch and its update; None for chips whose rates are unknown."""
        return estimate_step(self.footprint.site)[0]

    @property
    def tokens_per_second(self) -> float:
        """Packed tokens of all chips by that bound; 0 where it is unknown."""
        seconds = self.step_seconds
        return rows_of(self.footprint.site).tokens / seconds if seconds else 0.0


def find_nearest(config: TrainConfig) -> Choice | None:
    """The first choice that fits: on the same mesh, then with engines elsewhere, then on up to eight times as many of
    the same chips, then on as many others."""
    plan = resolve(config.mesh)
    same = [config.mesh.name]
    more = list(_larger(plan))
    others = [name for chip in CHIPS.values() if _comparable(chip, plan) for name in _names(chip, plan.chips)]
    ways = ((same, False), (same, True), (more, False), (more, True), (others, False), (others, True))
    for names, elsewhere in ways:
        for name in names:
            if choices := list(list_choices(config, name, elsewhere=elsewhere)):
                return min(choices, key=lambda choice: (len(choice.options), choice.step_seconds or 0.0))
    return None


def rank_meshes(config: TrainConfig, chips: Sequence[str], most: int) -> list[Choice]:
    """The fastest choice that fits of every mesh of these chips, of ``most`` chips at most: fewest chips first, then
    the most tokens a second."""
    found = []
    for chip in chips:
        for name in _names(CHIPS[chip], *(2**power for power in range(13) if 2**power <= most)):
            choices = [*list_choices(config, name, elsewhere=False)] or [*list_choices(config, name, elsewhere=True)]
            if choices:
                found.append(max(choices, key=lambda choice: choice.tokens_per_second))
    return sorted(found, key=lambda choice: (choice.plan.chips, -choice.tokens_per_second))


def list_choices(config: TrainConfig, name: str, *, elsewhere: bool) -> Iterator[Choice]:
    """Those that fit a mesh, by its splits and by how much layers keep; ``elsewhere``: engines are servers."""
    plan = resolve(MeshConfig(name=name))
    for mesh in _splits(config, plan):
        for gib in sorted({config.step.activation_gib, _TIGHT}, reverse=True):
            try:
                choice = _try(config, mesh, activation_gib=gib, elsewhere=elsewhere)
            except ForgejaxError:
                continue  # it does not divide
            if choice is not None:
                yield choice
                break


def rows_of(site: Site) -> Rows:
    """A full micro-batch of a site."""
    packing = site.config.packing
    return Rows(
        rows=packing.rows * site.learner.shards("rows"), length=packing.row_length, edges=packing.row_length - 1
    )


def estimate_step(site: Site) -> tuple[float | None, dict[str, Work]]:
    """The bound of one full micro-batch and its update, in seconds, and the work of each."""
    policy = site.config.policy
    works = {
        "micro-batch": count_micro_batch(
            policy, rows_of(site), choose_kept_of(site), site.learner, site.config.packing.block
        ),
        "update": count_update(policy, site.learner),
    }
    seconds = [max(found.values()) for work in works.values() if (found := work.seconds(site.plan.chip))]
    return (sum(seconds) if len(seconds) == len(works) else None), works


def _try(config: TrainConfig, mesh: MeshConfig, *, activation_gib: float, elsewhere: bool) -> Choice | None:
    """The configuration so changed, with as many pages as have room where what it asks for has not."""
    plan = resolve(mesh)
    packing = dataclasses.replace(config.packing, block_size=0, row_length=_round_row(config, plan))
    rollout = dataclasses.replace(config.rollout, mesh=EngineMesh(), engines=_ELSEWHERE if elsewhere else "local")
    changed = dataclasses.replace(
        config,
        mesh=mesh,
        packing=packing.on(plan.platform, plan.context),
        step=dataclasses.replace(config.step, activation_gib=activation_gib),
        rollout=rollout,
    )
    footprint = Footprint.of(Site.of(changed))
    left = footprint.pages_left
    if footprint.refuse() and left is not None and left >= changed.engine.context_pages:
        changed = dataclasses.replace(changed, engine=dataclasses.replace(changed.engine, kv_pages=left))
        footprint = Footprint.of(Site.of(changed))
    return None if footprint.refuse() else Choice(options=_options(config, changed), footprint=footprint)


def _options(before: TrainConfig, after: TrainConfig) -> tuple[str, ...]:
    """What was changed, as one would type it."""
    plan = resolve(after.mesh)
    told = [f"--mesh={after.mesh.name}"]
    if plan.shape != resolve(before.mesh).shape:
        told += [f"--mesh.{axis} {getattr(plan, axis)}" for axis in ("data", "fsdp", "context", "expert", "tensor")]
    for option, old, new in (
        ("--packing.row-length", before.packing.row_length, after.packing.row_length),
        ("--step.activation-gib", before.step.activation_gib, after.step.activation_gib),
        ("--engine.kv-pages", before.engine.kv_pages, after.engine.kv_pages),
    ):
        if old != new:
            told.append(f"{option} {new}")
    if after.rollout.engines != before.rollout.engines:
        told.append(f"--rollout.engines {' '.join(map(str, after.rollout.engines))}")  # type: ignore[arg-type]
    return tuple(told)


def _splits(config: TrainConfig, plan: MeshPlan) -> Iterator[MeshConfig]:
    """The configuration's own axes where these are its devices, then others: heads within a host, rows of many devices
    where one row is long, experts where there are any."""
    if plan.devices == resolve(config.mesh).devices:
        yield dataclasses.replace(config.mesh, name=plan.name)
    host, experts = count_host_devices(plan), config.policy.moe.num_experts
    for tensor in sorted({host // 2 or 1, host, 2 * host} & {*_powers(config.policy.num_heads)}):
        for expert in (1, 4, 8) if experts else (1,):
            for context in (1, 4, 16):
                rest, over = divmod(plan.devices, tensor * expert * context)
                if rest and not over:
                    axes = {"data": 1, "fsdp": rest, "context": context, "expert": expert, "tensor": tensor}
                    yield MeshConfig(name=plan.name, **axes)


def _round_row(config: TrainConfig, plan: MeshPlan) -> int:
    """The row's length, up to what its blocks deal evenly to the devices that share it."""
    each = plan.context * (512 if plan.platform == "tpu" else 64)
    return -(-config.packing.row_length // each) * each


def _larger(plan: MeshPlan) -> Iterator[str]:
    count = plan.chips * 2
    while count <= _MOST_TIMES * plan.chips:
        yield from _names(plan.chip, count)
        count *= 2


def _names(chip: Chip, *counts: int) -> Iterator[str]:
    for count in counts:
        yield f"{chip.name}-{count * chip.counted_per_chip}"


def _comparable(chip: Chip, plan: MeshPlan) -> bool:
    """Whether it is another chip of the same platform with more memory for each device."""
    there, here = (each.hbm_bytes and each.hbm_bytes / each.devices_per_chip for each in (chip, plan.chip))
    return chip.platform == plan.platform and bool(there and here and there > here)


def _powers(most: int) -> list[int]:
    return [2**power for power in range(max(most, 1).bit_length()) if 2**power <= most]
