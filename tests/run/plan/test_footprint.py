"""Laws of what lies on each chip, against an 8B policy counted by hand."""

from __future__ import annotations

import dataclasses

import pytest

from forgejax.errors import MeshError
from forgejax.run.plan.chips import describe_chips
from forgejax.run.plan.footprint import Footprint
from forgejax.run.plan.needs import Need, count_step_bytes
from forgejax.run.plan.residents import Site, count_residents
from forgejax.sharding import Layout, MeshConfig, build_mesh, resolve
from tests.run.plan.pods import load_pod

_GIB = 2**30
_WEIGHTS = 8_190_735_360  # of Qwen3-8B


def test_weights_moments_and_gradients_are_split_over_all_chips_and_an_engine_over_those_of_a_host() -> None:
    found = count_residents(Site.of(load_pod()))
    whole = 36 * (2 * 4096 + 2 * 128) + 4096  # norms, which every chip has whole
    split = _WEIGHTS - whole
    assert found.weights == 2 * (split // 64 + whole)
    assert (found.masters, found.gradients) == (4 * (split // 64 + whole),) * 2
    assert found.moments == pytest.approx(2 * found.masters, rel=1e-6)
    assert found.engine == 2 * (split // 4 + whole)
    assert found.page == 2 * 36 * 2 * 128 * 2 * 64  # two of eight key heads, in BF16, for 64 tokens


def test_the_pods_configuration_fits_by_count_with_every_host_an_engine() -> None:
    site = Site.of(load_pod())
    footprint = Footprint.of(site)
    assert (site.hosts, site.engine.mesh.size if site.engine and site.engine.mesh else 0) == (16, 4)
    assert footprint.refuse() == ""
    assert footprint.tokens_left is not None and footprint.tokens_left > 4 * 32_768


def test_while_weights_are_published_an_engine_has_them_twice() -> None:
    footprint = Footprint.of(Site.of(load_pod()))
    (publish,) = (phase for phase in footprint.phases if phase.name == "publish")
    assert publish.parts["weights that arrive"] == publish.parts["engine's weights"] == footprint.residents.engine
    assert "gradients" not in publish.parts


def test_what_was_compiled_stands_in_place_of_what_is_counted() -> None:
    site = Site.of(load_pod())
    footprint = Footprint.of(site, {"decode": Need(name="decode", bytes=20 * _GIB, compiled=True)})
    assert (footprint.worst.name, footprint.worst.compiled) == ("decode", True)
    assert footprint.refuse().startswith("decode needs ")


def test_pages_beyond_what_is_left_and_contexts_beyond_it_are_refused_with_what_there_is_room_for() -> None:
    site = Site.of(load_pod())
    left = Footprint.of(site).pages_left
    assert left is not None
    for pages, fits in ((left, True), (left + 1, False)):
        engine = dataclasses.replace(site.config.engine, kv_pages=pages)
        footprint = Footprint.of(dataclasses.replace(site, config=dataclasses.replace(site.config, engine=engine)))
        assert (footprint.refuse() == "") is fits
    long = load_pod("--engine.max-context=200704", "--engine.kv-pages=0", "--packing.row-length=200704")
    assert "one request of engine.max_context 200,704 takes" in Footprint.of(Site.of(long)).refuse() or (
        "GiB on each chip" in Footprint.of(Site.of(long)).refuse()
    )


def test_an_engine_of_other_devices_than_a_hosts_is_refused() -> None:
    with pytest.raises(MeshError, match=r"takes 2 devices and .* 4"):
        Site.of(load_pod("--rollout.mesh.tensor=2"))


@pytest.mark.parametrize(
    ("split", "keep", "row", "measured"),
    [
        ({"context": 16, "tensor": 4}, "share", 204_800, 2.51),
        ({"context": 32, "tensor": 2}, "share", 212_992, 3.28),
        ({"context": 8, "tensor": 8}, "share", 200_704, 3.02),
        ({"context": 64, "tensor": 1}, "nothing", 229_376, 4.75),
        ({"context": 16, "tensor": 4}, "nothing", 204_800, 5.32),
    ],
)
def test_the_count_of_a_step_is_near_what_the_tpu_compiler_wants(
    split: dict[str, int], keep: str, row: int, measured: float
) -> None:
    """GiB that libtpu 0.0.42.1 wants for one row of a tree, beside weights, gradients and optimizer."""
    plan = resolve(MeshConfig(name="v5e-64", data=1, fsdp=1, expert=1, **split))
    layout = Layout(mesh=build_mesh(plan, describe_chips(plan)))
    found = count_step_bytes(load_pod().policy, row, keep, layout) / _GIB  # type: ignore[arg-type]
    assert abs(found - measured) < 0.5
