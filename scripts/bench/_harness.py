"""What every benchmark shares: medians, the machine they were taken on, and one way to print."""

from __future__ import annotations

import functools
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp


def clocked(run: Callable[[], Any]) -> float:
    """Seconds of one call, its results waited for."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def medians(runs: Sequence[Callable[[], float]], repeats: int) -> tuple[float, ...]:
    """The median of what each run says it took.

    Runs take turns, so that other work on the machine slows all of them alike.
    """
    taken: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats):
        for run, times in zip(runs, taken, strict=True):
            times.append(run())
    return tuple(statistics.median(times) for times in taken)


def seconds(*runs: Callable[[], Any], repeats: int = 5) -> tuple[float, ...]:
    """Median wall clock of each run after one call that compiles; results are waited for."""
    for run in runs:
        jax.block_until_ready(run())
    return medians([functools.partial(clocked, run) for run in runs], repeats)


def matmul_flops(size: int = 1024, dtype: str = "float32", repeats: int = 5) -> float:
    """FLOP/s of a square product on the default device: what the machine gives, busy or not, at this moment."""
    a, b = (jax.random.normal(jax.random.key(seed), (size, size), dtype) for seed in (0, 1))
    product = jax.jit(jnp.matmul)
    return 2 * size**3 / seconds(lambda: product(a, b), repeats=repeats)[0]


def machine() -> dict[str, Any]:
    """Devices, cores and how busy they are, versions, and the commit measured."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "devices": jax.device_count(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "commit": _commit(),
    }


def show(result: Mapping[str, Any], as_json: bool) -> None:
    """Prints a result as one line of JSON, or as one figure a line."""
    if as_json:
        print(json.dumps({**result, "machine": machine()}))
        return
    for name, value in result.items():
        print(f"{name:24s} {value:.4g}" if isinstance(value, float) else f"{name:24s} {value}")


def _commit() -> str:
    """The commit of the checkout, with a plus where files differ from it; unknown outside one."""
    root = Path(__file__).resolve().parents[2]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"
