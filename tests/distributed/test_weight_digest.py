import mlx.core as mx
import pytest

from mlxflow.distributed import weight_digest
from mlxflow.distributed.weight_digest import digest_of


@pytest.mark.parametrize("at_once", [4, 1 << 22])
def test_every_bit_and_every_place_counts(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_digest, "_AT_ONCE", at_once)
    values = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    tree = {"a": mx.array(values), "b": mx.array([1.0, 2.0, 3.0], mx.bfloat16)}
    trees = [
        tree,
        tree | {"a": mx.array([*values[:5], 6.0000005])},
        tree | {"a": mx.array([2.0, 1.0, *values[2:]])},
        tree | {"a": mx.array([*values[:5], 7.0])},
        tree | {"b": mx.array([1.0, 3.0, 2.0], mx.bfloat16)},
        {"a": tree["b"], "b": tree["a"]},
    ]
    digests = [digest_of(one).item() for one in trees]
    assert len(set(digests)) == len(trees)
    assert digests[0] == digest_of(tree).item()
