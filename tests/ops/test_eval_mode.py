import mlx.nn as nn
import pytest

from mlxflow.ops.eval_mode import evaluating


def _modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


@pytest.mark.parametrize("fails", [False, True])
def test_every_submodule_gets_its_own_mode_back(fails: bool) -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 2)))
    model.layers[1].layers[0].eval()
    before = _modes(model)
    assert len(set(before)) == 2

    def evaluate() -> None:
        with evaluating(model):
            assert not any(_modes(model))
            if fails:
                raise ZeroDivisionError

    if fails:
        with pytest.raises(ZeroDivisionError):
            evaluate()
    else:
        evaluate()
    assert _modes(model) == before
