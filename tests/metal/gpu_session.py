"""A test run in which the tests marked gpu run on the stand-in for Metal: pytest -m gpu --metal."""

import sys
from contextlib import ExitStack
from unittest import mock

import pytest

from mlxflow.kernels import registry
from tests.metal import clang, stand_in, verifier


def begin(config: pytest.Config) -> None:
    """Let this process have the stand-in as its GPU until the run ends.

    Raises:
        pytest.UsageError: clang is missing or too old.
    """
    if clang.missing():
        raise pytest.UsageError(clang.missing())
    stack = ExitStack()
    stack.enter_context(stand_in.metal())
    stack.enter_context(verifier.untimed())
    command = (sys.executable, "-m", verifier.__name__, "-")
    stack.enter_context(mock.patch.object(registry, "COMMAND", command))
    stand_in.StandInKernel.orders = None
    config.add_cleanup(stack.close)


#: What is left out, by the beginning of its name, and why.
_LEFT_OUT = {
    "test_training_on_long_rows_of_documents": "minutes, and attention has no kernel for Metal",
    "test_a_hundred_steps_give_the_same_losses_with_and_without_kernels[fp32-fused": "bf16 is trained this way",
    "test_a_hundred_steps_give_the_same_losses_with_and_without_kernels[bf16-plain": "fp32 is trained this way",
    "test_a_hundred_steps_give_the_same_losses_with_and_without_kernels[bf16-pure-fused": "bf16 is trained this way",
}


def leave_out(items: list[pytest.Item]) -> None:
    """Skip the tests that take too long on a CPU."""
    for item in items:
        for name, reason in _LEFT_OUT.items():
            if item.name.startswith(name):
                item.add_marker(pytest.mark.skip(reason=f"left out on the stand-in for Metal: {reason}"))
