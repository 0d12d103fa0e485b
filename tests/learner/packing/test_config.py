"""What rows can be."""

from __future__ import annotations

from typing import Any

import pytest

from forgejax.errors import ConfigError
from forgejax.learner.packing.config import PackConfig
from forgejax.sharding.topology import Platform


def test_a_row_that_is_no_multiple_of_its_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match="multiple"):
        PackConfig(row_length=100, block_size=64)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"row_length": 1}, "rows of at least 2 tokens"),
        ({"block_size": -1}, "packing.block_size -1"),
        ({"pair_cost": float("nan")}, "packing.pair_cost nan"),
        ({"token_cost": -1.0}, "numbers of at least 0"),
        ({"token_cost": 0.0, "pair_cost": 0.0}, "one above"),
    ],
)
def test_what_no_row_can_be_or_cost_is_refused_with_what_was_given(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        PackConfig(**wrong)


@pytest.mark.parametrize(
    ("platform", "row_length", "length_shards", "block"),
    [("cpu", 512, 1, 64), ("gpu", 480, 1, 32), ("tpu", 8192, 1, 512), ("tpu", 4224, 1, 128), ("tpu", 8192, 64, 128)],
)
def test_blocks_follow_the_platform_and_divide_what_a_device_has_of_a_row(
    platform: Platform, row_length: int, length_shards: int, block: int
) -> None:
    config = PackConfig(row_length=row_length).on(platform, length_shards)

    assert (config.block_size, config.trunks) == (block, length_shards == 1)
    assert PackConfig(row_length=row_length, block_size=16).on(platform, 1).block_size == 16


def test_a_row_whose_blocks_cannot_be_shared_out_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"row_length 96 on a mesh with context = 4: expected a multiple of 4 x .* 128"
    ):
        PackConfig(row_length=96, block_size=32).on("cpu", 4)
