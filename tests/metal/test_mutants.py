import pytest

from mlxflow.kernels.kernel_names import TYPES
from tests.metal import operations
from tests.metal.execution import KernelFaultError
from tests.metal.mutants import MUTANTS


@pytest.mark.usefixtures("metal")
@pytest.mark.parametrize("name", MUTANTS)
def test_a_kernel_with_a_fault_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant = MUTANTS[name]
    monkeypatch.setattr(mutant.module, mutant.source, mutant.value())
    operation = operations.every(TYPES[mutant.dtype])[mutant.operation]
    if mutant.refusal == "deviates":
        assert operation.error() > 10
        return
    with pytest.raises((KernelFaultError, RuntimeError), match=f"^({mutant.refusal})$"):
        operation.error()
