"""What lies in deploy/ is what its readers take, and starts a run that loads and fills the hosts it asks for."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from forgejax.run.config import TrainConfig, load_shape
from forgejax.run.plan.chips import count_host_devices
from forgejax.sharding import resolve

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
_OWN = ("--resume=auto",)  # of train.py itself, not of the configuration


def read(name: str) -> str:
    return (DEPLOY / name).read_text(encoding="utf-8")


def schema(name: str) -> Any:
    return json.loads((Path(__file__).parent / f"{name}.schema.json").read_text(encoding="utf-8"))


def train_arguments(text: str) -> list[str]:
    """Those of the one call of scripts/train.py, placeholders filled in."""
    (found,) = re.findall(r"scripts/train\.py ([^\"&]*(?:\"\$POD[^\"]*\"[^\"&]*)*)", text.replace("\\\n", " "))
    return shlex.split(found.replace("$POD", "/pod"))


def load(arguments: list[str]) -> TrainConfig:
    """The configuration of a call, whose model is not here."""
    options = [each for each in arguments if each not in _OWN]
    at = options.index("--config")
    file = ROOT / options[at + 1]
    return load_shape(file, [*options[:at], *options[at + 2 :]])[0]


def jobset() -> Any:
    return yaml.safe_load(read("jobset.yaml"))


def test_the_manifest_is_a_jobset_whose_pods_are_the_hosts_of_its_mesh() -> None:
    found = jobset()
    jsonschema.validate(found, schema("jobset"))
    (job,) = found["spec"]["replicatedJobs"]
    spec, pod = job["template"]["spec"], job["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    plan = resolve(load(container["command"][2:]).mesh)
    assert spec["parallelism"] == spec["completions"] == plan.devices // count_host_devices(plan)
    assert container["resources"]["limits"]["google.com/tpu"] == str(count_host_devices(plan))
    sides = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    assert int(sides[0]) * int(sides[1]) == plan.chips
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert spec["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"  # one pod less: all begin anew


def test_a_manifest_with_a_key_that_no_jobset_has_is_refused() -> None:
    found = jobset()
    found["spec"]["failurePolicy"]["maxRestart"] = 3
    with pytest.raises(jsonschema.ValidationError, match="maxRestart"):
        jsonschema.validate(found, schema("jobset"))


def test_skypilots_task_has_the_keys_of_its_reference_and_the_chips_of_its_mesh() -> None:
    found = yaml.safe_load(read("skypilot.yaml"))
    jsonschema.validate(found, schema("skypilot"))
    plan = resolve(load(train_arguments(found["run"])).mesh)
    assert found["resources"]["accelerators"] == f"tpu-v5litepod-{plan.chips}"
    for script in (found["setup"], found["run"]):
        subprocess.run(["bash", "-n", "-c", script], check=True, timeout=20)


@pytest.mark.parametrize("name", ["tpu_vm.sh", "xpk.sh", "slurm.sh"])
def test_scripts_are_bash_that_stops_at_the_first_failure_and_can_be_called(name: str) -> None:
    subprocess.run(["bash", "-n", str(DEPLOY / name)], check=True, timeout=20)
    assert "set -euo pipefail" in read(name)
    assert (DEPLOY / name).stat().st_mode & 0o111


def test_xpk_is_given_options_that_it_has() -> None:
    parser = argparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
    parser.add_argument("words", nargs="*")
    needed = ("workload", "cluster", "project", "zone", "tpu-type", "docker-image", "command")
    for name in (*needed, "num-slices", "max-restarts"):
        parser.add_argument(f"--{name}", required=name in needed)
    (call,) = re.findall(r"^xpk (.*)$", read("xpk.sh").replace("\\\n", " "), re.MULTILINE)
    found = parser.parse_args(shlex.split(call))
    assert found.words == ["workload", "create"]
    plan = resolve(load(train_arguments(found.command)).mesh)
    assert (found.tpu_type, found.num_slices) == (f"v5litepod-{plan.chips}", "1")


def test_gcloud_is_given_options_that_it_has_and_a_slice_of_the_documented_mesh() -> None:
    text = read("tpu_vm.sh")
    calls = re.findall(r"gcloud compute tpus tpu-vm (\w+) (.*)$", text.replace("\\\n", " "), re.MULTILINE)
    known = {
        "create": {"project", "zone", "accelerator-type", "version"},
        "ssh": {"project", "zone", "worker", "command"},
        "delete": {"project", "zone", "quiet"},
    }
    assert {verb for verb, _ in calls} == set(known)
    for verb, words in calls:
        assert set(re.findall(r"--([a-z-]+)", words)) == known[verb]
    (kind,) = re.findall(r"TYPE:-v5litepod-(\d+)", text)
    assert resolve(load(["--mesh=v5e-64", "--config", "configs/qwen3_8b_v5e64.toml"]).mesh).chips == int(kind)


def test_slurms_nodes_are_the_machines_of_its_mesh() -> None:
    text = read("slurm.sh")
    given = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", text, re.MULTILINE))
    config = load([each for each in train_arguments(text) if each != "$@"])
    plan = resolve(config.mesh)
    assert plan.chip.name == "h100"
    assert int(given["nodes"]) * int(given["gpus-per-node"]) == plan.chips
    assert given["ntasks-per-node"] == "1"  # a process has all devices of its machine


def test_the_image_installs_the_pins_that_the_tests_run_with() -> None:
    text = read("Dockerfile")
    copied = set(re.findall(r"requirements[a-z-]*\.txt", text))
    assert {"requirements.txt", "requirements-tpu.txt", "requirements-cuda.txt"} <= copied
    assert all((ROOT / name).is_file() for name in copied)
    jax = re.search(r"^jax==(\S+)", (ROOT / "requirements.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert jax is not None and f"=={jax[1]}\n" in (ROOT / "requirements-cuda.txt").read_text(encoding="utf-8")
