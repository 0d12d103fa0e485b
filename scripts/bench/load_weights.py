"""Host memory and time that loading weights takes, above the arrays themselves.

    python scripts/bench/load_weights.py --path models/smollm2-135m-instruct --json

Without a path, a random Llama of 125M numbers is written first. Counted is what the process holds at its fullest, pages
of mapped files included, less what it held before and what the arrays take (on a CPU they lie in the same memory).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import tyro

from forgejax.errors import ForgejaxError
from forgejax.models import PolicyConfig, abstract_policy, export_policy, init_params, load_params, read_policy_config
from forgejax.sharding import Layout, MeshConfig, build_mesh, prepare_platform, resolve

_BOUND = 1.3  # of the largest shard
_RESET_PEAK = "5"  # what /proc/self/clear_refs takes to forget the highest resident size


@dataclass(frozen=True, kw_only=True)
class Options:
    path: Path | None = None
    """Folder or GGUF file; random weights if left out."""
    mesh: str = "cpu-1"
    """The mesh the weights are spread over."""
    dtype: str = "float32"
    """param_dtype."""
    json: bool = False
    """Print one JSON object."""


def main(options: Options) -> int:
    if options.path is None:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "random"
            _in_new_process("write", folder)
            return _report(_in_new_process("measure", folder, options.mesh, options.dtype), options.json)
    return _report(_in_new_process("measure", options.path, options.mesh, options.dtype), options.json)


def write(folder: Path) -> dict[str, Any]:
    config = PolicyConfig(vocab_size=32_768, num_layers=12, d_model=768, num_heads=12, num_kv_heads=4, d_ff=2048)
    export_policy(config, init_params(config), folder, like=None)
    return {}


def measure(path: Path, mesh_name: str, dtype: Any) -> dict[str, Any]:
    plan = resolve(MeshConfig(name=mesh_name))
    prepare_platform(plan, extra_devices=0)
    layout = Layout(mesh=build_mesh(plan))
    config = read_policy_config(path, PolicyConfig(path=str(path), param_dtype=dtype))
    abstract_policy(config)  # what tracing allocates is no part of loading
    Path("/proc/self/clear_refs").write_text(_RESET_PEAK, encoding="ascii")
    before, start = _resident("VmRSS"), time.perf_counter()
    params = load_params(config, layout)
    taken, peak = time.perf_counter() - start, _resident("VmHWM")
    leaves = jax.tree.leaves(params)
    shards = [shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards]
    above = peak - before - sum(shards)
    return {
        "path": str(path),
        "mesh": mesh_name,
        "numbers": sum(leaf.size for leaf in leaves),
        "seconds": round(taken, 2),
        "arrays_mib": round(sum(shards) / 2**20, 1),
        "largest_shard_mib": round(max(shards) / 2**20, 1),
        "peak_above_arrays_mib": round(above / 2**20, 1),
        "ratio": round(above / max(shards), 3),
        "bound": _BOUND,
    }


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def _in_new_process(what: str, *arguments: object) -> dict[str, Any]:
    command = [sys.executable, __file__, what, *map(str, arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=600)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def _report(figures: dict[str, Any], as_json: bool) -> int:
    print(json.dumps(figures) if as_json else "\n".join(f"{key:24} {value}" for key, value in figures.items()))
    return 0 if figures["ratio"] <= _BOUND else 1


if __name__ == "__main__":
    try:
        if sys.argv[1:2] == ["write"]:
            print(json.dumps(write(Path(sys.argv[2]))))
        elif sys.argv[1:2] == ["measure"]:
            print(json.dumps(measure(Path(sys.argv[2]), *sys.argv[3:5])))
        else:
            sys.exit(main(tyro.cli(Options, description=__doc__)))
    except ForgejaxError as error:
        sys.exit(f"load_weights: {error}")
    except subprocess.CalledProcessError as error:  # it has said why
        sys.exit(error.returncode)
