from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlxflow.distributed import rank, team
from mlxflow.distributed.rank import Rank
from mlxflow.distributed.team import Team
from mlxflow.kernels import model_kernels
from mlxflow.messages.errors import ArtifactError
from mlxflow.training import kernel_selection
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


def test_only_the_first_rank_verifies_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = KernelRequest("auto", "gpu", tmp_path / "kernels.json")
    monkeypatch.setattr(rank, "of_this_process", lambda: Rank(1, 2, "ring"))
    assert isinstance(kernel_selection.begin_early("auto", "gpu"), nullcontext)
    assert isinstance(kernel_selection.begin_verification(request), nullcontext)


@pytest.mark.parametrize("number", [0, 1])
def test_all_ranks_use_the_selection_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    request = KernelRequest("auto", "gpu", tmp_path / "run/kernels.json")
    events: list[str] = []

    class _Exchanging(Team):
        def exchange(self, what: str, numbers: Sequence[int]) -> Any:
            events.append(what)
            if self.rank.number:
                request.remember(["rank 0's"])

    def choose(model: Any, traits: Any, *, recorded: list[str] | None, **_: Any) -> SimpleNamespace:
        events.append("chosen")
        return SimpleNamespace(selected=recorded or ["rank 0's"], refused={})

    monkeypatch.setattr(team, "of_this_process", lambda: _Exchanging(Rank(number, 2), None))
    monkeypatch.setattr(model_kernels, "choose_for", choose)
    subject: Any = SimpleNamespace(model=None, kernel_traits=None)
    selected = kernel_selection.select_kernels(request, subject, None)  # type: ignore[arg-type]
    assert selected.selected == request.recorded() == ["rank 0's"]
    assert events == (["selection of kernels", "chosen"] if number else ["chosen", "selection of kernels"])
