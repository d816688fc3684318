import io
import sys
from types import SimpleNamespace

import pytest

from mlxflow.messages.errors import StageError
from mlxflow.workflow.handover import Basis, Handover, receive

HANDOVER = Handover(Basis("[train]\n", [["is_file", ["a\udcff"], True, None]]), {"seed": 0}, {"a": "12"})


def _receive(data: bytes, monkeypatch: pytest.MonkeyPatch) -> Handover | None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))
    return receive()


def test_receive_returns_what_was_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _receive(HANDOVER.as_bytes(), monkeypatch) == HANDOVER
    assert _receive(b"", monkeypatch) is None
    monkeypatch.setattr(sys, "stdin", None)
    assert receive() is None


def test_check_accepts_equal_settings_and_inputs() -> None:
    HANDOVER.check("train", {"seed": 0}, {"a": "12"})
    HANDOVER._replace(settings={"betas": [1, 2]}).check("train", {"betas": (1, 2)}, {"a": "12"})
    HANDOVER._replace(inputs=None).check("train", {"seed": 0}, {"another": "34"})


def test_check_names_every_difference() -> None:
    with pytest.raises(StageError) as caught:
        HANDOVER.check("train", {"seed": 1}, {"a": "34", "b": "56"})
    assert str(caught.value).splitlines() == [
        "train: mlxflow or MLX was changed since the build began. Build again.",
        "a: changed since the build checked it for train. Build again.",
        "b: changed since the build checked it for train. Build again.",
    ]
