"""Laws of a dry run where no compiler of the chips is: shapes are checked, bytes counted, and the nearest plan told."""

from __future__ import annotations

import dataclasses
import json

import pytest

from forgejax.models import read_policy_config
from forgejax.run.plan import dry_run
from forgejax.run.plan.dry_run import plan_run
from forgejax.run.plan.footprint import Footprint
from forgejax.run.plan.nearest import Choice, find_nearest, list_choices, rank_meshes
from forgejax.run.plan.residents import Site
from forgejax.run.plan.show import show_choices, to_json, to_text
from tests.run.plan.pods import ROOT, load_pod


@pytest.fixture(autouse=True)
def _no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry_run, "can_compile", lambda plan: False)


def told_nothing(line: str) -> None:
    raise AssertionError(line)


def test_a_run_that_fits_is_told_with_bytes_tokens_and_a_bound_of_its_time() -> None:
    found = plan_run(load_pod(), told_nothing)
    text, data = to_text(found), json.loads(to_json(found))
    assert (found.fits, data["fits"], data["hosts"]) == (True, True, 16)
    assert text.startswith("v5e-64: 64 devices = fsdp 4 x context 4 x tensor 4, 16 hosts, an engine on each host's 4")
    assert text.endswith("it fits (shapes checked and bytes counted; nothing compiled)")
    assert data["phases"]["publish"]["weights that arrive"] == found.footprint.residents.engine  # type: ignore[union-attr]
    assert data["seconds"]["micro-batch"]["compute"] == pytest.approx(1.18, abs=0.01)
    assert data["tokens_left"] > 100_000


def test_an_8b_policy_on_four_chips_is_refused_with_the_nearest_plan() -> None:
    found = plan_run(load_pod("--mesh=v5e-4", "--mesh.fsdp=0", "--mesh.context=0", "--mesh.tensor=0"), told_nothing)
    assert not found.fits and "GiB on each chip" in found.reason
    assert found.nearest is not None and found.nearest.plan.chip.name == "v5e"
    assert found.nearest.footprint.refuse() == ""
    assert to_text(found).splitlines()[-1].startswith("the nearest that does, by count: --mesh=v5e-")


def test_what_does_not_divide_by_the_mesh_is_a_reason_too() -> None:
    found = plan_run(load_pod("--mesh.fsdp=1", "--mesh.context=1", "--mesh.tensor=64"), told_nothing)
    assert found.footprint is None and "does not divide" in found.reason
    assert found.nearest is not None


def test_the_nearest_choice_is_one_that_its_own_options_make() -> None:
    config = load_pod("--engine.kv-pages=40000")
    choice = find_nearest(config)
    assert choice is not None
    (pages,) = (option for option in choice.options if option.startswith("--engine.kv-pages"))
    again = load_pod(*(word for option in choice.options for word in option.split()))
    assert again.engine.kv_pages == int(pages.split()[1])
    assert Footprint.of(Site.of(again)).refuse() == ""


@pytest.mark.parametrize(("shape", "mesh"), [("qwen3-30b-a3b", "v5e-64"), ("minimax-m2", "v5p-512")])
def test_mixtures_too_large_for_an_engine_on_each_host_are_planned_with_what_is_near(shape: str, mesh: str) -> None:
    config = load_pod()
    policy = read_policy_config(ROOT / "examples/shapes" / shape, base=dataclasses.replace(config.policy, path=""))
    axes = {"fsdp": 0, "context": 1, "expert": 8, "tensor": 4}
    changed = dataclasses.replace(config, policy=policy, mesh=dataclasses.replace(config.mesh, name=mesh, **axes))
    found = plan_run(changed, told_nothing)
    assert not found.fits and "engine's weights" in found.reason
    assert found.nearest is not None and found.nearest.footprint.refuse() == ""
    assert found.nearest.footprint.usable > found.footprint.usable  # type: ignore[union-attr, operator]


def test_meshes_are_ranked_by_chips_and_each_by_its_fastest_settings() -> None:
    config = load_pod()
    ranked = rank_meshes(config, ["v5e"], 64)
    chips = [choice.plan.chips for choice in ranked]
    assert chips == sorted(chips) and chips[-1] == 64
    fastest = max(choice.tokens_per_second for choice in list_choices(config, "v5e-64", elsewhere=False))
    assert ranked[-1].tokens_per_second == fastest
    assert show_choices(ranked).count("--mesh=v5e-") == len(ranked)


def test_a_choice_tells_nothing_of_time_for_chips_of_unknown_rates() -> None:
    config = load_pod("--mesh=cpu-4", "--mesh.fsdp=2", "--mesh.context=1", "--mesh.tensor=2")
    choice = Choice(options=(), footprint=Footprint.of(Site.of(config)))
    assert (choice.step_seconds, choice.tokens_per_second) == (None, 0.0)
