"""Two real processes are one learner: what it computes, and what it keeps.

Dear, for jax is started twice and compiles what all its devices compute; nothing less shows that it can be one job.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from forgejax.run.checkpoint import Checkpoints
from tests.run.pod.member import NoPlace, make_config, make_learner, train
from tests.run.tiny_run import REPOSITORY

MESH = "cpu-4"


def run_job(folder: Path, cache: Path) -> list[tuple[int, str]]:
    """Exit codes and what was said of a job of two processes of two devices each."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        coordinator = f"127.0.0.1:{server.getsockname()[1]}"
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "JAX_COMPILATION_CACHE_DIR": str(cache)}
    del env["JAX_NUM_CPU_DEVICES"]
    command = [sys.executable, "-m", "tests.run.pod.member", coordinator, "2"]
    job = [
        subprocess.Popen([*command, str(number), MESH, str(folder)], env=env, text=True, stderr=subprocess.PIPE)
        for number in range(2)
    ]
    said = [process.communicate(timeout=400)[1] for process in job]
    return [(process.returncode, words) for process, words in zip(job, said, strict=True)]


@pytest.mark.timeout(500)
def test_two_processes_make_the_updates_of_one_and_each_restores_the_others_checkpoint(
    tmp_path: Path, compiled_once: Path
) -> None:
    learner, _ = make_learner(make_config(tmp_path / "runs", MESH))
    ours = train(learner, make_config(tmp_path / "runs", MESH))
    weights = [np.asarray(each) for each in jax.tree.leaves(learner.weights)]
    checkpoints = Checkpoints(tmp_path / "theirs", 2)
    checkpoints.save(5, learner.state, {}, NoPlace())
    checkpoints.close()

    ends = run_job(tmp_path, compiled_once)
    assert [code for code, _ in ends] == [0, 0], ends
    theirs = np.load(tmp_path / "found.npz")
    for name in ("loss", "grad_norm", "score"):
        np.testing.assert_allclose(theirs[name], ours[name], rtol=1e-6, atol=1e-6)
    for number, mine in enumerate(weights):
        np.testing.assert_allclose(theirs[f"w{number}"], mine, rtol=1e-6, atol=1e-6)
    assert theirs["restored"] == learner.digest()

    other, _ = make_learner(make_config(tmp_path / "runs", "cpu-8", "--mesh.tensor=2"))
    again = Checkpoints(tmp_path / "ours", 2)
    step, state, figures = again.restore(other.state, NoPlace())
    again.close()
    assert (step, figures) == (5, {"figure": 5})
    for number, found in enumerate(jax.tree.leaves(state.params)):
        np.testing.assert_array_equal(np.asarray(found), theirs[f"w{number}"])
