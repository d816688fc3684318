import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlxflow.kernels import adamw
from mlxflow.training.objective import plain_objective
from mlxflow.training.optimizers import make_optimizer, make_schedule
from mlxflow.training.step import Step
from mlxflow.training.update import Update
from tests.small_models import llama


def _train(*, served: bool, spoilt: bool = False) -> tuple[list[float], dict[str, mx.array]]:
    model, _ = llama()
    model.train()
    schedule = make_schedule(
        name="cosine", learning_rate=1e-2, final_learning_rate=0, num_steps=20, warmup_steps=3, decay_steps=0
    )
    optimizer = make_optimizer(name="adamw", schedule=schedule, weight_decay=0.1, options={"bias_correction": True})
    update = Update(model, optimizer, max_grad_norm=1.0, has_masters=False, uses_kernel=lambda _: served)
    step = Step(model, update, plain_objective(masks_documents=False))
    tokens = mx.random.randint(0, 50, (4, 9), key=mx.random.key(1))
    losses = []
    for number in range(20):
        gradients = step.compute(tokens, mx.full((4, 9), 3, mx.uint8))
        if spoilt and number == 5:
            gradients = gradients._replace(total=mx.array(float("nan")))
        outcome = step.update(gradients)
        mx.eval(outcome, step.state)
        losses.append(float(outcome.loss))
    return losses, dict(tree_flatten(step.state[1]))


@pytest.mark.parametrize("spoilt", [False, True])
def test_the_fused_adamw_update_and_state_match_mlx(monkeypatch: pytest.MonkeyPatch, spoilt: bool) -> None:
    calls = []

    def reference(*arguments: object) -> object:
        calls.append(1)
        return adamw.reference(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(adamw, "kernel", reference)
    monkeypatch.setattr(adamw, "kernel_sum_of_squares", adamw.reference_sum_of_squares)
    ours, state = _train(served=True, spoilt=spoilt)
    theirs, expected = _train(served=False, spoilt=spoilt)
    assert calls
    assert ours == pytest.approx(theirs, rel=1e-4, nan_ok=True)
    assert state.keys() == expected.keys()
    for name, value in state.items():
        assert mx.allclose(value, expected[name], rtol=1e-3, atol=1e-5), name
