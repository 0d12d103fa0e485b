"""A run is put together from its configuration."""

from tests.run.tiny_run import Ended


def test_a_taken_port_is_no_obstacle_and_the_one_chosen_is_told(ended: Ended) -> None:
    line = next(line for line in ended.notes if line.startswith("the gateway listens at http://127.0.0.1:"))
    port = int(line.removeprefix("the gateway listens at http://127.0.0.1:").split("/")[0])

    assert port != ended.config.gateway.port
