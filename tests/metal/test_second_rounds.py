"""Verification takes every loop of a kernel a second round: a loop that ends after its first one is refused."""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import mlx.core as mx
import numpy as np
import pytest

from mlxflow.kernels import adamw, cross_entropy, embedding, rms_norm, rotary, verification, verification_inputs
from mlxflow.kernels.codegen import KernelSource
from mlxflow.kernels.verification_cases import case_of
from tests.metal import stand_in

_NORMS = ("rms_norm/float32/776", "rms_norm/float32/4104")  # four rows of a group, and one
_FROZEN = ("rms_norm_frozen/float32/776", "rms_norm_frozen/float32/4104")
_FROZEN_SUMS = ("sum_rms_norm_frozen/bfloat16/776", "sum_rms_norm_frozen/bfloat16/4104")
_SUMS = ("sum_rms_norm/bfloat16/776", "sum_rms_norm/bfloat16/4104")

#: Kernels with loops whose rounds depend on a shape, and the names by which each is verified.
KERNELS = [
    (rms_norm, "FORWARD", _NORMS),
    (rms_norm, "BACKWARD", _NORMS),
    (rms_norm, "FROZEN_BACKWARD", _FROZEN),
    (rms_norm, "SUM_FROZEN_BACKWARD", _FROZEN_SUMS),
    (rms_norm, "ADD_SHARES", _NORMS),
    (rms_norm, "SUM_FORWARD", _SUMS),
    (rms_norm, "SUM_BACKWARD", _SUMS),
    (rotary, "_SOURCE", ("rotary/float32/48", "rotary_interleaved/float32/48")),
    (embedding, "_SOURCE", ("embedding/float32",)),
    (cross_entropy, "_SOURCE", ("cross_entropy/float32",)),
    (adamw, "_SQUARES", ("sum_of_squares/float32",)),
]

#: Loops whose rounds after the first change no result: they fill what a group without a row never uses.
_WITHOUT_EFFECT = {
    "rms_norm BACKWARD body 4",
    "rms_norm SUM_BACKWARD body 4",
    "rms_norm FROZEN_BACKWARD body 2",
    "rms_norm SUM_FROZEN_BACKWARD body 2",
}

_LOOP = re.compile(r"\bfor \([^;]*; [^;]*; (?:(?P<up>\w+) [+]= [^;{]*?|[+][+](?P<next>\w+))\)(?=\s)")


class Loop(NamedTuple):
    """A loop of a kernel.

    Attributes:
        module: of the kernel.
        name: of its source in there.
        verified: the names by which the kernel is verified.
        part: "body" or "header".
        place: of the loop in that part.
    """

    module: Any
    name: str
    verified: tuple[str, ...]
    part: str
    place: int

    def __str__(self) -> str:
        return f"{self.module.__name__.rpartition('.')[2]} {self.name} {self.part} {self.place}"


def _loops() -> Iterator[Loop]:
    for module, name, verified in KERNELS:
        source: KernelSource = getattr(module, name)
        for part in ("header", "body"):
            loops = _LOOP.findall(getattr(source, part))
            assert len(loops) == len(re.findall(r"\bfor \(", getattr(source, part)))
            yield from (Loop(module, name, verified, part, number) for number in range(len(loops)))


def _ended_early(text: str, number: int) -> str:
    """Return a text whose loop of a number ends after its first round."""
    found: re.Match[str] = list(_LOOP.finditer(text))[number]
    counter = found["up"] or found["next"]
    step = found[0].rpartition("; ")[2]
    return text[: found.end() - len(step)] + f"{counter} = 1 << 30)" + text[found.end() :]


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Verify with inputs that are small on a GPU of few cores, in one order of threads."""
    monkeypatch.setattr(verification_inputs, "_TABLE_NUMBERS", 40 * 2312)
    with stand_in.metal(cores=5) as kernels:
        kernels.orders = 1
        yield


def _passes(name: str) -> bool:
    case = case_of(name)
    if name.startswith("sum_of_squares"):  # MLX adds all numbers one after another on the CPU
        case = case._replace(reference=lambda x: [mx.array(float((np.array(x, np.float64) ** 2).sum()))])
    with mock.patch.object(verification, "_CHECKED", 1 << (18 if name.startswith("embedding") else 13)):
        return verification._error(case) <= case.tolerance


@pytest.mark.metal
@pytest.mark.usefixtures("compiler", "_small")
@pytest.mark.parametrize("name", sorted({name for *_, verified in KERNELS for name in verified}))
def test_the_kernels_as_they_are_pass(name: str) -> None:
    assert _passes(name)


@pytest.mark.metal
@pytest.mark.usefixtures("compiler", "_small")
@pytest.mark.parametrize("loop", [*_loops()], ids=str)
def test_a_loop_that_ends_after_its_first_round_is_refused(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    source: KernelSource = getattr(loop.module, loop.name)
    texts = {"body": source.body, "header": source.header}
    texts[loop.part] = _ended_early(texts[loop.part], loop.place)
    mutant = source._replace(name=f"{source.name}_mutant", body=texts["body"], header=texts["header"])
    monkeypatch.setattr(loop.module, loop.name, mutant)
    assert all(map(_passes, loop.verified)) == (str(loop) in _WITHOUT_EFFECT)
