import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import save

from mlxflow.storage.tensor_types import FORMAT_NAMES, NUMPY_TYPES, UNREAD_TYPES, WEIGHT_TYPES


@pytest.mark.parametrize("name", sorted(FORMAT_NAMES.keys() - {"bfloat16"}))  # which numpy does not have
def test_format_names_are_those_of_the_safetensors_library(name: str) -> None:
    assert f'"dtype":"{FORMAT_NAMES[name]}"'.encode() in save({"a": np.zeros(1, name)})


def test_every_type_is_one_of_mlx() -> None:
    assert all(isinstance(getattr(mx, name.replace("bool", "bool_")), mx.Dtype) for name in FORMAT_NAMES)
    assert not UNREAD_TYPES & set(FORMAT_NAMES.values())


@pytest.mark.parametrize("name", NUMPY_TYPES)
def test_numpy_types_are_little_endian_types_of_the_same_name(name: str) -> None:
    dtype = np.dtype(NUMPY_TYPES[name])
    assert FORMAT_NAMES[dtype.name] == name
    assert NUMPY_TYPES[name].startswith("<")


@pytest.mark.parametrize("name", WEIGHT_TYPES)
def test_weight_types_are_read_as_integers_of_their_size(name: str) -> None:
    bits, mlx_name = WEIGHT_TYPES[name]
    assert FORMAT_NAMES[mlx_name] == name
    assert np.dtype(bits).itemsize == getattr(mx, mlx_name).size
