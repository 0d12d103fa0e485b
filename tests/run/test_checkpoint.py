"""Checkpoints: what is saved comes back bit for bit, into the model it belongs to and no other."""

import asyncio
import dataclasses
import gc
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from forgejax.errors import CheckpointError, StorageFullError
from forgejax.learner import Learner, StepConfig
from forgejax.models import PolicyConfig, abstract_policy, init_params
from forgejax.report.storage import find_damage
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


def test_any_place_in_the_data_comes_back(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(1, state(1.0), {}, Counted(5))
    checkpoints.save(2, state(1.0), {}, numbers())
    checkpoints.wait()
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


def test_a_save_cut_off_by_a_crash_is_no_checkpoint_and_goes_by_the_next_save(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=3)
    checkpoints.save(1, state(1.0), {}, numbers())
    checkpoints.wait()
    checkpoints.close()
    torn = tmp_path / "2.orbax-checkpoint-tmp"
    torn.mkdir()
    (torn / "state").mkdir()

    again = Checkpoints(tmp_path, keep=3)
    assert again.latest == 1
    again.save(3, state(3.0), {}, numbers())
    again.wait()
    again.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "3"]


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


def saved_in(folder: Path, *steps: int) -> None:
    checkpoints = Checkpoints(folder, keep=len(steps))
    for step in steps:
        checkpoints.save(step, state(float(step)), {"steps": step}, Counted(step))
    checkpoints.wait()
    checkpoints.close()


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_any_damage_to_any_file_of_a_checkpoint_is_noticed(tmp_path: Path) -> None:
    saved_in(tmp_path, 1)
    for file in files_in(tmp_path / "1"):
        sound = file.read_bytes()
        for number, place in enumerate(range(0, len(sound), max(1, len(sound) // 5))):
            damaged = bytearray(sound)
            damaged[place] ^= 1 << (number % 8)
            file.write_bytes(damaged)
            assert find_damage(tmp_path / "1") is not None
        for change in (sound[:-1], sound + b"x"):
            file.write_bytes(change)
            assert find_damage(tmp_path / "1") is not None
        file.unlink()
        assert find_damage(tmp_path / "1") is not None
        file.write_bytes(sound)
    assert find_damage(tmp_path / "1") is None


@pytest.mark.parametrize("how", ["flipped", "unsealed", "empty"])
def test_in_place_of_a_damaged_checkpoint_the_one_before_it_is_used_and_told(tmp_path: Path, how: str) -> None:
    saved_in(tmp_path, 1, 2, 3)
    if how == "flipped":
        largest = max(files_in(tmp_path / "3"), key=lambda file: file.stat().st_size)
        content = bytearray(largest.read_bytes())
        content[len(content) // 2] ^= 4
        largest.write_bytes(content)
    elif how == "unsealed":
        (tmp_path / "3" / "checksums.json").unlink()
    else:
        shutil.rmtree(tmp_path / "3")
        (tmp_path / "3").mkdir()

    checkpoints = Checkpoints(tmp_path, keep=3)
    place = Counted(0)
    step, found, figures = checkpoints.restore(state(0.0), place)
    assert (step, figures, place.given, float(found["layer"]["w"][0, 0])) == (2, {"steps": 2}, 2, 2.0)
    (told,) = checkpoints.set_aside
    assert told.startswith("the checkpoint of step 3 is damaged: ") and told.endswith("damaged-3")
    checkpoints.save(3, state(9.0), {}, Counted(3))
    checkpoints.wait()
    checkpoints.close()
    again = Checkpoints(tmp_path, keep=3)
    assert (again.set_aside, again.latest) == ([], 3)
    again.close()
    assert (tmp_path / "damaged-3").is_dir()


def test_where_all_checkpoints_are_damaged_nothing_is_begun(tmp_path: Path) -> None:
    saved_in(tmp_path, 1, 2)
    for step in (1, 2):
        (tmp_path / str(step) / "figures" / "metadata").write_text("{}")
    with pytest.raises(CheckpointError, match=r"all checkpoints in .* are damaged: .*step 2.*step 1.*start a new run"):
        Checkpoints(tmp_path, keep=2)


def test_weights_that_do_not_match_their_checksums_are_not_read(tmp_path: Path) -> None:
    save_tree(tmp_path / "tree", state(0.3))
    stored = next(file for file in files_in(tmp_path / "tree") if file.parent.name == "d")
    content = bytearray(stored.read_bytes())
    content[-1] ^= 1
    stored.write_bytes(content)
    with pytest.raises(CheckpointError, match="does not match its checksum; use another copy or step"):
        load_tree(tmp_path / "tree", state(0.0))


def test_a_disk_without_room_is_told_at_once_with_the_last_safe_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for safe in ("no step is safe yet", "the last safe step is 5"):
        with monkeypatch.context() as patch:
            patch.setattr("forgejax.run.checkpoint.shutil.disk_usage", lambda _: SimpleNamespace(free=20))
            with pytest.raises(CheckpointError, match=f"step 6 could not be written .* its disk is full.*: {safe}"):
                checkpoints.save(6, state(1.0), {}, Counted(6))
        if safe.startswith("no"):
            checkpoints.save(5, state(1.0), {}, Counted(5))
            checkpoints.wait()
    checkpoints.close()


def test_a_full_disk_under_orbax_is_one_sentence_and_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(1, state(1.0), {}, Counted(1))
    checkpoints.wait()
    with monkeypatch.context() as patch:
        patch.setattr(ocp.CheckpointManager, "_finalize_checkpoint", refuse)
        checkpoints.save(2, state(2.0), {}, Counted(2))
        with pytest.raises(
            CheckpointError, match=r"its disk is full\. The run ends here.* the last safe step is 1\. Free"
        ):
            checkpoints.wait()
        checkpoints.close()
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == []


def test_a_write_that_ends_after_its_save_has_failed_says_nothing_and_other_errors_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[sys.UnraisableHookArgs] = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)

    def end_late() -> None:
        promise: tensorstore.Promise[int]
        future: tensorstore.Future[int]
        promise, future = tensorstore.Promise.new()
        loop = asyncio.new_event_loop()
        waiting = loop.create_task(_await(future))
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
        promise.set_result(1)
        waiting._log_destroy_pending = False  # type: ignore[attr-defined]

    end_late()
    assert [str(each.exc_value) for each in told] == ["Event loop is closed"], "what TensorStore says by itself"
    checkpoints = Checkpoints(tmp_path, keep=2)
    end_late()
    assert len(told) == 1
    broken = Broken()
    del broken
    assert [str(each.exc_value) for each in told[1:]] == ["broken"]
    checkpoints.close()
    end_late()
    assert len(told) == 3


async def _await(future: tensorstore.Future[int]) -> None:
    await future


class Broken:
    def __del__(self) -> None:
        raise RuntimeError("broken")


def test_a_save_that_fails_in_the_background_is_told_by_the_next_check_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(folder: Path) -> None:
        raise StorageFullError(f"{folder} could not be written: the disk is full (No space left on device)")

    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(1, state(1.0), {}, Counted(1))
    checkpoints.wait()
    checkpoints.check()
    monkeypatch.setattr("forgejax.run.checkpoint.write_checksums", refuse)
    checkpoints.save(2, state(2.0), {}, Counted(2))
    with pytest.raises(CheckpointError, match=r"step 2 could not be written .* the last safe step is 1"):
        checkpoints.wait()
    with pytest.raises(CheckpointError, match="step 2 could not be written"):
        checkpoints.check()
    checkpoints.close()
    assert not (tmp_path / "2").exists()
    again = Checkpoints(tmp_path, keep=2)
    assert (again.latest, again.set_aside) == (1, [])
    again.close()


def test_the_weights_of_a_bf16_policy_come_back_as_they_ran_and_in_fp32_as_they_were_trained(tmp_path: Path) -> None:
    policy = PolicyConfig(
        vocab_size=16, num_layers=1, d_model=8, num_heads=2, num_kv_heads=1, d_ff=8, param_dtype="bfloat16"
    )
    graphdef, like = abstract_policy(policy)
    learner = Learner(graphdef, init_params(policy), StepConfig())
    moved = jax.tree.map(lambda x: x * 1.001, learner.state.params)  # between two numbers that bf16 has
    learner.state = dataclasses.replace(learner.state, params=moved)
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    checkpoints.save(1, learner.state, {}, numbers())
    checkpoints.wait()
    checkpoints.close()

    _, ran = load_trained(tmp_path / "checkpoints", None, like)
    wide = abstract_policy(dataclasses.replace(policy, param_dtype="float32"))[1]
    _, trained = load_trained(tmp_path / "checkpoints", None, wide)

    for found, expected in ((ran, learner.weights), (trained, moved)):
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
    assert jax.tree.leaves(ran)[0].dtype == jnp.bfloat16
