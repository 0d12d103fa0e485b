"""Laws of the partition rules."""

import pytest

from forgejax.errors import ConfigError, MeshError
from forgejax.sharding import Rules


def test_a_logical_axis_names_its_mesh_axes_major_first() -> None:
    rules = Rules(mlp=("tensor", "expert"))
    assert rules.axes("mlp") == ("tensor", "expert")
    assert rules.axes("embed") == ("fsdp", "context")
    assert rules.axes(None) == rules.axes("norm") == ()


def test_names_that_are_no_axes_are_refused() -> None:
    with pytest.raises(MeshError, match="unknown logical axis 'hedas'; expected one of vocab"):
        Rules().axes("hedas")
    with pytest.raises(ConfigError, match=r"rules.mlp is \['model'\]; expected distinct axes of data, fsdp"):
        Rules(mlp=("model",))
    with pytest.raises(ConfigError, match=r"rules.mlp is \['tensor', 'tensor'\]"):
        Rules(mlp=("tensor", "tensor"))
