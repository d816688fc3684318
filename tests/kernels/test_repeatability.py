import json
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import pytest

from mlxflow.kernels import kernel_names, model_kernels, registry, repeatability, verification
from mlxflow.kernels.model_kernels import TrainingTraits
from mlxflow.kernels.verifier_process import VerificationResult
from tests.metal import stand_in
from tests.small_models import llama

_TRAITS = TrainingTraits("fp32", 16)


@pytest.fixture
def on_metal() -> Iterator[None]:
    with stand_in.metal():
        yield


@pytest.fixture
def short_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeatability, "_LENGTH", 16)


def _noisy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the gradient of attention be off by one unit in the last place every other time, as sums in any order are."""
    plain, calls = mx.fast.scaled_dot_product_attention, [0]

    def attend(queries: mx.array, *others: mx.array, **named: Any) -> mx.array:
        calls[0] += 1
        if calls[0] % 2:
            queries = queries * mx.array(1 + 2**-7, queries.dtype)
        return plain(queries, *others, **named)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", attend)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("is_masked", [False, True])
def test_equal_gradients_pass_and_different_bits_do_not(
    dtype: str, is_masked: bool, monkeypatch: pytest.MonkeyPatch, short_rows: None
) -> None:
    name = repeatability.attention_check(kernel_names.TYPES[dtype], 64, is_masked=is_masked)
    assert name == f"mlx_attention{'_masked' * is_masked}/{dtype}/64"
    assert kernel_names.is_known(name)
    assert repeatability.check(name) == VerificationResult(True, "")
    _noisy(monkeypatch)
    assert repeatability.check(name) == VerificationResult(False, "two runs of its gradient are not equal to the bit")


def test_the_verifier_process_checks_attention_beside_the_kernels(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], short_rows: None
) -> None:
    monkeypatch.setattr(mx, "set_cache_limit", lambda limit: 0)
    verification.main(["mlx_attention/bfloat16/64"])
    begin, result = capsys.readouterr().out.splitlines()
    assert begin == "begin mlx_attention/bfloat16/64"
    assert json.loads(result)["passed"] is True


def test_on_metal_a_model_asks_for_the_check_and_attention_follows_it(
    on_metal: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama()[0]
    (name,) = model_kernels._attention_kernels(model, _TRAITS)
    assert name.startswith("mlx_attention/float32/")
    for passed in (True, False):
        results = {name: VerificationResult(passed, "" if passed else repeatability.DIFFERS)}
        monkeypatch.setattr(registry, "choose", lambda *_: registry.KernelSelection(results))  # noqa: B023
        chosen = model_kernels.choose_for(model, _TRAITS)
        assert chosen.keeps_mlx_attention is passed
        assert chosen.selected == [name] * passed  # kept in the report, and for resuming
        assert chosen.refused == {}  # no kernel: `kernels = "require"` asks for kernels only
        again = model_kernels.choose_for(model, _TRAITS, recorded=chosen.selected)
        assert again.keeps_mlx_attention is passed


def test_a_run_that_is_not_deterministic_takes_mlxs_attention_unchecked(on_metal: None) -> None:
    assert model_kernels._attention_kernels(llama()[0], _TRAITS._replace(is_deterministic=False)) == set()
    assert not model_kernels.no_kernels().keeps_mlx_attention
