"""The matmul rate this machine reaches: what utilisation is measured against where no data sheet says."""

from __future__ import annotations

import dataclasses
from typing import Literal

import tyro
from _harness import matmul_flops, show


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Sizes to try; the best is the peak."""

    sizes: tuple[int, ...] = (512, 1024, 2048)
    dtype: Literal["float32", "bfloat16"] = "float32"
    repeats: int = 5
    json: bool = False


def main(options: Options) -> None:
    rates = {size: matmul_flops(size, options.dtype, options.repeats) for size in options.sizes}
    result = {f"gflops_{size}": rate / 1e9 for size, rate in rates.items()}
    show({"dtype": options.dtype, **result, "peak_gflops": max(rates.values()) / 1e9}, options.json)


if __name__ == "__main__":
    main(tyro.cli(Options))
