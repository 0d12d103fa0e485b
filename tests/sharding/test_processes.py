"""Which environment asks for several processes, and what options cannot be one of them."""

import threading
import time
from pathlib import Path

import pytest

from forgejax.errors import ConfigError
from forgejax.sharding import DistributedConfig, MeshConfig, resolve
from forgejax.sharding.processes import give_up_after, is_several

TPU = resolve(MeshConfig(name="v5e-64"))
CPU = resolve(MeshConfig(name="cpu-4"))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"coordinator": "10.0.0.2:8476"}, "processes is missing"),
        ({"coordinator": "10.0.0.2", "processes": 2, "process_id": 0}, "expected HOST:PORT"),
        ({"coordinator": "10.0.0.2:70000", "processes": 2, "process_id": 0}, "expected HOST:PORT"),
        ({"coordinator": "10.0.0.2:8476", "processes": 2, "process_id": 2}, "expected 0 to 1"),
        ({"coordinator": "10.0.0.2:8476", "processes": 2, "process_id": 1, "silence_s": 0.0}, "silence-s is 0.0"),
    ],
)
def test_options_that_name_no_process_are_refused(options: dict, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        DistributedConfig(**options)


@pytest.mark.parametrize(
    ("environ", "several"),
    [({}, False), ({"SLURM_NTASKS": "1"}, False), ({"SLURM_NTASKS": "4"}, True), ({"OMPI_COMM_WORLD_SIZE": "2"}, True)],
)
def test_a_scheduler_of_several_tasks_asks_for_several_processes(
    tmp_path: Path, environ: dict[str, str], several: bool
) -> None:
    assert is_several(DistributedConfig(), CPU, environ, tmp_path) is several


@pytest.mark.parametrize(("chips", "several"), [(4, True), (64, False), (0, False)])
def test_a_slice_of_more_chips_than_the_machine_has_is_one_of_several_hosts(
    tmp_path: Path, chips: int, several: bool
) -> None:
    (tmp_path / "dev").mkdir()
    for number in range(chips):
        (tmp_path / "dev" / f"accel{number}").touch()
    assert is_several(DistributedConfig(), TPU, {}, tmp_path) is several
    assert not is_several(DistributedConfig(), CPU, {}, tmp_path)


def test_options_for_a_single_process_ask_for_none_beside_it() -> None:
    alone = DistributedConfig(coordinator="127.0.0.1:1", processes=1, process_id=0)
    assert not is_several(alone, CPU, {})


def test_who_waits_too_long_for_the_others_says_so_and_ends(capsys: pytest.CaptureFixture[str]) -> None:
    config, ended = DistributedConfig(start_s=0.05), threading.Event()
    codes: list[int] = []

    def leave(code: int) -> None:
        codes.append(code)
        ended.set()

    with give_up_after(config, leave):
        assert ended.wait(10.0)
    assert codes == [1]
    assert "not all processes of the job have come within 0.05 s; start the same" in capsys.readouterr().err

    with give_up_after(DistributedConfig(start_s=0.2), leave):
        pass  # they came
    time.sleep(0.3)
    assert codes == [1]
