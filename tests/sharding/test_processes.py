"""Which environment asks for several processes, and what options cannot be one of them."""

import socket
import threading
from pathlib import Path

import pytest

from forgejax.errors import ConfigError, MeshError
from forgejax.sharding import DistributedConfig, MeshConfig, resolve
from forgejax.sharding.processes import await_coordinator, is_several

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


def test_a_first_process_that_comes_late_is_waited_for_and_one_that_never_comes_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    with pytest.raises(
        MeshError, match=rf"process 0 of the job does not listen at {address} after 0\.3 s .*every host"
    ):
        await_coordinator(DistributedConfig(coordinator=address, processes=2, process_id=1, start_s=0.3))

    late = socket.socket()
    late.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    late.bind(("127.0.0.1", int(address.rpartition(":")[2])))
    coming = threading.Timer(0.3, late.listen)
    coming.start()
    await_coordinator(DistributedConfig(coordinator=address, processes=2, process_id=1, start_s=30.0))
    coming.join()
    late.close()
