"""Checkpoints: what is saved comes back bit for bit, into the model it belongs to and no other."""

import gc
import shutil
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from forgejax.errors import CheckpointError
from forgejax.run.checkpoint import Checkpoints, load_trained, load_tree, save_tree


def numbers() -> grain.DatasetIterator[int]:
    return iter(grain.MapDataset.range(100).to_iter_dataset())


def state(value: float, width: int = 4) -> dict[str, Any]:
    return {"layer": {"w": jnp.full((2, width), value)}, "step": jnp.int32(3)}


def test_state_figures_and_the_place_in_the_data_come_back(tmp_path: Path) -> None:
    checkpoints, iterator = Checkpoints(tmp_path, keep=2), numbers()
    for _ in range(7):
        next(iterator)
    checkpoints.save(3, state(0.1), {"gap_max": 1e-7, "steps": 3}, iterator)
    checkpoints.wait()
    checkpoints.close()

    again, resumed = Checkpoints(tmp_path, keep=2), numbers()
    step, found, figures = again.restore(state(0.0), resumed)
    assert (step, figures) == (3, {"gap_max": 1e-7, "steps": 3})
    np.testing.assert_array_equal(found["layer"]["w"], np.full((2, 4), 0.1, np.float32))
    assert next(resumed) == 7
    again.close()


class Counted:
    """A place in some data, as a checkpoint knows it."""

    def __init__(self, given: int) -> None:
        self.given = given

    def get_state(self) -> dict[str, Any]:
        return {"given": self.given}

    def set_state(self, state: dict[str, Any]) -> None:
        self.given = state["given"]


def test_any_place_in_the_data_comes_back_and_lies_there_as_grain_would_have_it(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(1, state(1.0), {}, Counted(5))
    checkpoints.save(2, state(1.0), {}, numbers())
    checkpoints.wait()
    by_grain = ocp.CheckpointManager(tmp_path / "by grain")
    by_grain.save(1, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(numbers())))
    by_grain.wait_until_finished()
    by_grain.close()
    (ours,), (theirs,) = ((at / "data").glob("process*") for at in (tmp_path / "2", tmp_path / "by grain" / "1"))
    assert (ours.name, ours.read_text()) == (theirs.name, theirs.read_text())
    checkpoints.close()

    shutil.rmtree(tmp_path / "2")
    again, place = Checkpoints(tmp_path, keep=2), Counted(0)
    again.restore(state(0.0), place)
    assert place.given == 5
    again.close()


def test_the_newest_are_kept_and_the_oldest_of_them_is_known(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert (checkpoints.latest, checkpoints.oldest) == (None, None)
    for step in (1, 2, 3):
        checkpoints.save(step, state(step), {}, numbers())
    checkpoints.wait()

    assert (checkpoints.latest, checkpoints.oldest) == (3, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]
    checkpoints.close()


def test_arrays_may_change_as_soon_as_a_save_has_returned(tmp_path: Path) -> None:
    checkpoints, live = Checkpoints(tmp_path, keep=1), state(1.0)
    double = jax.jit(lambda tree: jax.tree.map(lambda x: x * 2, tree), donate_argnums=0)
    checkpoints.save(1, live, {}, numbers())
    double(live)
    checkpoints.wait()

    _, found, _ = checkpoints.restore(state(0.0), numbers())
    np.testing.assert_array_equal(found["layer"]["w"], np.ones((2, 4), np.float32))
    checkpoints.close()


def test_a_restored_state_lies_where_the_one_it_replaces_lies(tmp_path: Path) -> None:
    mesh = Mesh(np.array(jax.devices()[:2]), ("rows",))
    split = NamedSharding(mesh, PartitionSpec("rows"))
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, {"w": jnp.arange(4.0)}, {}, numbers())
    checkpoints.wait()

    _, found, _ = checkpoints.restore({"w": jax.device_put(jnp.zeros(4), split)}, numbers())
    assert found["w"].sharding == split
    np.testing.assert_array_equal(found["w"], np.arange(4.0))
    checkpoints.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax leaves its other reads behind
@pytest.mark.parametrize("like", [state(0.0, width=5), {"other": jnp.zeros(2)}])
def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path, like: dict[str, Any]) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, state(1.0), {}, numbers())
    checkpoints.wait()

    with pytest.raises(CheckpointError, match=r"checkpoint of step 1 in .* cannot be restored into this model"):
        checkpoints.restore(like, numbers())
    checkpoints.close()
    gc.collect()


def test_restoring_from_nothing_says_to_start_anew(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    with pytest.raises(CheckpointError, match="holds no checkpoint; start the run anew, without --resume"):
        checkpoints.restore(state(0.0), numbers())
    checkpoints.close()


def test_a_save_cut_off_by_a_crash_is_no_checkpoint(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=3)
    checkpoints.save(1, state(1.0), {}, numbers())
    checkpoints.wait()
    checkpoints.close()
    torn = tmp_path / "2.orbax-checkpoint-tmp-1"
    torn.mkdir()
    (torn / "state").mkdir()

    again = Checkpoints(tmp_path, keep=3)
    assert again.latest == 1
    again.close()


def test_one_tree_goes_to_a_file_and_back_and_into_no_other_policy(tmp_path: Path) -> None:
    save_tree(tmp_path / "deep" / "tree", state(0.3))

    found = load_tree(tmp_path / "deep" / "tree", state(0.0))
    np.testing.assert_array_equal(found["layer"]["w"], np.full((2, 4), 0.3, np.float32))
    assert int(found["step"]) == 3
    with pytest.raises(CheckpointError, match="holds no weight other"):
        load_tree(tmp_path / "deep" / "tree", {"other": jnp.zeros(3)})
    with pytest.raises(CheckpointError, match=r"layer\.w has shape \(2, 4\) and this policy's has \(2, 5\)"):
        load_tree(tmp_path / "deep" / "tree", state(0.0, width=5))
    with pytest.raises(CheckpointError, match="is no folder of saved weights"):
        load_tree(tmp_path / "gone", state(0.0))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="cannot be read as weights of this policy"):
        load_tree(tmp_path / "empty", state(0.0))


def test_the_weights_alone_come_out_of_a_runs_checkpoint_without_the_moments(tmp_path: Path) -> None:
    checkpoints, weights = Checkpoints(tmp_path, keep=2), state(0.0)["layer"]
    for step in (4, 8):
        trained = {"params": state(step)["layer"], "moments": {"w": jnp.ones((1000, 1000))}}
        checkpoints.save(step, trained, {}, numbers())
        checkpoints.wait()
    checkpoints.close()
    newest, found = load_trained(tmp_path, None, weights)
    np.testing.assert_array_equal(found["w"], np.full((2, 4), 8.0))
    assert newest == 8 and set(found) == {"w"}
    assert load_trained(tmp_path, 4, jax.eval_shape(lambda: weights))[1]["w"].tolist() == [[4.0] * 4] * 2
    np.testing.assert_array_equal(load_tree(tmp_path / "4", weights)["w"], np.full((2, 4), 4.0))


def test_weights_are_asked_for_by_a_step_that_is_kept(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no checkpoint; give a run's folder"):
        load_trained(tmp_path / "gone", None, state(0.0))
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(4, {"params": state(4.0)}, {}, numbers())
    checkpoints.wait()
    checkpoints.close()
    (tmp_path / "9.orbax-checkpoint-tmp-1").mkdir()  # a save under way, or cut off
    assert load_trained(tmp_path, None, state(0.0))[0] == 4
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 9; kept are \[4\]"):
        load_trained(tmp_path, 9, state(0.0))
