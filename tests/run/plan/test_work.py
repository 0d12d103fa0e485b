"""Laws of what a step computes and moves, against figures taken by hand."""

from __future__ import annotations

import pytest

from forgejax.models import MoEConfig, PolicyConfig
from forgejax.run.plan.work import Rows, Work, count_active, count_decode, count_micro_batch, count_update
from forgejax.sharding import CHIPS, ONE_DEVICE

_SMALL = PolicyConfig(vocab_size=100, num_layers=2, d_model=8, num_heads=2, num_kv_heads=1, head_dim=4, d_ff=16)


def test_a_token_is_multiplied_with_its_own_experts_alone() -> None:
    attention = 2 * 8 * 4 * (2 + 1)
    assert count_active(_SMALL) == 2 * (attention + 3 * 8 * 16)
    mixture = PolicyConfig(**{**vars(_SMALL), "moe": MoEConfig(num_experts=32, experts_per_token=4, d_ff=16)})
    assert count_active(mixture) == 2 * (attention + 3 * 8 * 16 * 4 + 8 * 32)


@pytest.mark.parametrize(("keep", "passes", "products"), [("products", 3, 9), ("nothing", 4, 11)])
def test_a_micro_batchs_flops_are_those_of_the_formula(keep: str, passes: int, products: int) -> None:
    rows = Rows(rows=3, length=10, edges=6)
    work = count_micro_batch(_SMALL, rows, keep, ONE_DEVICE, 5)  # type: ignore[arg-type]
    pairs = 3 * 10 * 11 // 2
    expected = 2 * passes * count_active(_SMALL) * 30 + 2 * products * 2 * 8 * pairs + 8 * 8 * 100 * 18
    assert (work.flops, work.sent) == (expected, 0.0)


def test_seconds_are_the_largest_of_three_quotients_on_each_chip() -> None:
    chip = CHIPS["v5e"]
    seconds = Work(flops=197e12, memory=819e9 / 2, sent=90e9 / 4).seconds(chip)
    assert seconds == pytest.approx({"compute": 1.0, "memory": 0.5, "links": 0.25})
    assert Work(flops=1.0, memory=1.0, sent=1.0).seconds(CHIPS["cpu"]) == {}


def test_an_update_moves_each_weight_in_its_own_bytes() -> None:
    weights = 100 * 8 + 8 + 2 * (8 + 8 + 2 * 8 * 4 * 3 + 3 * 8 * 16)
    assert count_update(_SMALL, ONE_DEVICE).memory == weights * (7 * 4 + 4 + 4)


def test_decoding_reads_the_weights_once_and_every_key() -> None:
    few, many = (count_decode(_SMALL, ONE_DEVICE, slots, 50) for slots in (1, 9))
    keys = 2 * 2 * 4 * 4 * 50
    assert many.memory - few.memory == 8 * keys
