"""A configuration planned for its mesh, whatever machine this is: what ``scripts/train.py --dry-run`` does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from forgejax.errors import ForgejaxError
from forgejax.ops import kernel_for
from forgejax.run.config import TrainConfig
from forgejax.run.plan.chips import can_compile
from forgejax.run.plan.footprint import Footprint
from forgejax.run.plan.nearest import Choice, find_nearest
from forgejax.run.plan.programs import CompiledProgram, compile_programs
from forgejax.run.plan.residents import Site
from forgejax.run.preflight import check_kernel


@dataclasses.dataclass(frozen=True, kw_only=True)
class DryRun:
    """What was found.

    Attributes:
        footprint: bytes of each chip; None where the configuration cannot be laid on the mesh at all.
        programs: those that the chips' compiler has compiled, by name.
        reason: why it cannot run; "" where it can.
        nearest: the nearest choice that fits, where this one does not; counted, not compiled.
    """

    footprint: Footprint | None
    programs: Mapping[str, CompiledProgram]
    reason: str
    nearest: Choice | None

    @property
    def fits(self) -> bool:
        return not self.reason


def plan_run(config: TrainConfig, told: Callable[[str], None]) -> DryRun:
    """Lays the run on its mesh, compiles it where the mesh's compiler is here, and says whether it fits.

    ``told`` gets a line before each program is compiled. Shapes that do not fit even by count are not compiled.
    """
    footprint: Footprint | None = None
    programs: Mapping[str, CompiledProgram] = {}
    try:
        site = Site.of(config)
        check_kernel(kernel_for(site.learner.mesh), config)
        footprint = Footprint.of(site)
        reason = footprint.refuse()
        if not reason and can_compile(site.plan):
            programs = compile_programs(site, told)
            footprint = Footprint.of(site, {name: program.need for name, program in programs.items()})
            reason = footprint.refuse()
    except ForgejaxError as error:
        reason = str(error)
    return DryRun(
        footprint=footprint, programs=programs, reason=reason, nearest=find_nearest(config) if reason else None
    )
