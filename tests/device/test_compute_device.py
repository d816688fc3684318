import os

import mlx.core as mx
import pytest

from mlxflow.device import compute_device
from mlxflow.messages.errors import WorkflowError


@pytest.mark.parametrize(
    ("text", "size"),
    [("80%", 800), ("12 GB", 12 * 10**9), ("512MiB", 512 * 2**20), ("1.5 kb", 1500), (" 7 B ", 7), ("100 %", 1000)],
)
def test_parse_size_accepts_shares_and_bytes(text: str, size: int) -> None:
    assert compute_device.parse_size(text, 1000) == size


@pytest.mark.parametrize("text", ["", "12", "GB", "-1 GB", "1 XB", "80%%"])
def test_parse_size_refuses_invalid_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="is no size such as '12 GB' or '80%'"):
        compute_device.parse_size(text, 1000)


@pytest.mark.skipif(mx.is_available(mx.gpu), reason="there is a GPU here")
def test_a_missing_gpu_is_an_error() -> None:
    with pytest.raises(WorkflowError) as caught:
        compute_device.select("gpu", key="workflow.device")
    assert str(caught.value) == 'workflow.device = "gpu": MLX finds no GPU here. Use workflow.device = "auto".'


def test_a_mac_on_which_mlx_cannot_use_the_gpu_computes_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX for macOS says that Metal is available on every machine, a virtual one without a GPU too."""
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "is_available", lambda device: device == mx.cpu)
    assert compute_device.select("auto") == "cpu"
    with pytest.raises(WorkflowError, match="MLX finds no GPU here"):
        compute_device.select("gpu")


def test_the_device_has_a_name_and_memory() -> None:
    assert compute_device.select("cpu") == "cpu"
    assert compute_device.name()
    assert compute_device.working_set_bytes() > 10**8


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ({"max_recommended_working_set_size": 5, "memory_size": 9}, 5),
        ({"total_memory": 85, "free_memory": 84}, 85),
        ({"memory_size": 9}, 9),
    ],
)
def test_the_working_set_is_the_limit_of_the_device(
    monkeypatch: pytest.MonkeyPatch, told: dict[str, int], expected: int
) -> None:
    monkeypatch.setattr(mx, "device_info", lambda: told)
    assert compute_device.working_set_bytes() == expected


def test_the_environment_names_the_device_only_for_stages_that_use_one() -> None:
    assert compute_device.environment(None).keys() == {"mlx"}
    assert compute_device.environment("auto").keys() == {"mlx", "device"}


_H100, _A100 = ({"compute_capability_major": major, "compute_capability_minor": 0} for major in (9, 8))


@pytest.mark.parametrize(
    ("told", "is_told", "recomputes", "size"),
    [
        (_H100, False, False, "30"),
        (_H100, False, True, "10"),
        (_H100, True, True, "77"),
        (_A100, False, False, None),
        ({}, False, False, None),
    ],
)
def test_cuda_graphs_are_small_on_a_large_device_unless_the_environment_sets_their_size(
    told: dict[str, int], is_told: bool, recomputes: bool, size: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLX_MAX_OPS_PER_BUFFER", "77")  # afterwards the environment is as it was
    if not is_told:
        monkeypatch.delenv("MLX_MAX_OPS_PER_BUFFER")
    monkeypatch.setattr(compute_device, "_IS_SET_BY_USER", is_told)
    monkeypatch.setattr(mx.cuda, "is_available", lambda: bool(told))
    monkeypatch.setattr(mx, "device_info", lambda: told)
    compute_device.bound_graphs(recomputes=recomputes)
    assert os.environ.get("MLX_MAX_OPS_PER_BUFFER") == size


@pytest.mark.parametrize(
    ("told", "variables", "limits"),
    [
        (_H100, {}, (100, 1001)),
        (_H100, {"MLX_MAX_OPS_PER_BUFFER": "10", "MLX_MAX_MB_PER_BUFFER": "7"}, (10, 8)),
        (_A100, {}, (20, 401)),
        ({"compute_capability_major": 8, "compute_capability_minor": 6}, {}, (20, 101)),
        ({"architecture": "applegpu_g13p"}, {}, (20, 41)),
        ({"architecture": "applegpu_g14g"}, {}, (40, 41)),
        ({"architecture": "applegpu_g14s"}, {}, (50, 51)),
    ],
)
def test_the_size_of_a_batch_is_that_of_the_device_unless_the_environment_sets_it(
    told: dict[str, object], variables: dict[str, str], limits: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MLX_MAX_OPS_PER_BUFFER", "MLX_MAX_MB_PER_BUFFER"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(mx, "device_info", lambda: told)
    operations, mega_elements = limits
    assert compute_device.batch_limits() == (operations, mega_elements << 20)
