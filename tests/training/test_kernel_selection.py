from pathlib import Path

import pytest

from mlxflow.messages.errors import ArtifactError
from mlxflow.training.kernel_selection import KernelRequest, Mode


@pytest.mark.parametrize(
    ("mode", "device", "uses_none"),
    [("off", "gpu", True), ("auto", "cpu", True), ("auto", "gpu", False), ("require", "cpu", False)],
)
def test_no_kernels_are_requested_if_off_or_automatic_on_the_cpu(
    tmp_path: Path, mode: Mode, device: str, uses_none: bool
) -> None:
    assert KernelRequest(mode, device, tmp_path / "kernels.json").uses_none is uses_none


def test_a_resumed_run_reuses_the_recorded_kernel_selection(tmp_path: Path) -> None:
    request = KernelRequest("auto", "gpu", tmp_path / "run/kernels.json")
    assert request.recorded() is None
    request.remember(["adamw/float32/float32"])
    assert request.recorded() == ["adamw/float32/float32"]
    for text in ("{", '{"a": 1}'):
        request.memory_file.write_text(text)
        assert request.recorded() is None


def test_a_repeated_run_uses_the_kernels_of_the_published_report(tmp_path: Path) -> None:
    request = KernelRequest("auto", "gpu", tmp_path / "kernels.json", published=tmp_path)
    report = tmp_path / "report.toml"
    report.write_text('kernels = ["adamw/float32/float32"]\nsteps = "of another version"\n')
    assert request.recorded() == ["adamw/float32/float32"]
    report.write_text("steps = 3\n")
    assert request.recorded() is None
    report.write_text('kernels = "all"\n')
    with pytest.raises(ArtifactError) as caught:
        request.recorded()
    assert str(caught.value) == f"{report}: kernels: expected `array | null`, got `str`. Remove it and build it again."
