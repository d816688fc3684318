"""Which method of quantization fits into the memory limit where the requested one does not."""

from collections.abc import Callable, Iterator

from mlxflow.messages.byte_sizes import show_bytes
from mlxflow.quantization.quantization_request import QuantizationRequest
from mlxflow.quantization.settings import GPTQ_BITS

# Methods that hold one block of the model, the most accurate at few bits first
_BY_BLOCK = ("block", "awq", "gptq", "rtn")


def memory_advice(
    request: QuantizationRequest,
    bytes_of: Callable[[QuantizationRequest], float],
    *,
    limit_bytes: int,
    learns_blocks: bool,
    task: str,
) -> str:
    """Return a line for a request whose arrays exceed the memory limit.

    Args:
        request: method, settings and limits.
        bytes_of: returns about the bytes of arrays that a request holds.
        limit_bytes: MLX's memory limit.
        learns_blocks: whether there are rows to calibrate on, and the model can be computed block by block.
        task: the stage.
    """
    line = f"{task}: about {show_bytes(bytes_of(request))} is more than the memory limit of {show_bytes(limit_bytes)}"
    sizes = {change: bytes_of(other) for change, other in _others(request, learns_blocks)}
    if fitting := next((change for change, size in sizes.items() if size <= limit_bytes), None):
        return f"{line}. Set {fitting}: it takes about {show_bytes(sizes[fitting])}."
    if least := min(sizes, key=sizes.__getitem__, default=None):
        return f"{line}, and {least}, which takes least, takes about {show_bytes(sizes[least])}. Raise the limit."
    return f"{line}. Raise the limit."


def _others(request: QuantizationRequest, learns_blocks: bool) -> Iterator[tuple[str, QuantizationRequest]]:
    """Yield other requests by the keys that change: without a part, then by other methods."""
    plain = request._replace(scale_steps=0, training=None, start=None)
    if request.method == "block" and request.scale_steps:
        yield "scale_steps = 0", plain
    for method in _BY_BLOCK:
        is_possible = method == "rtn" or learns_blocks
        if method == "gptq" and (request.default.mode != "affine" or request.default.bits not in GPTQ_BITS):
            is_possible = False
        if method != request.method and is_possible:
            yield f'method = "{method}"', plain._replace(method=method)
    if request.budget is not None:
        yield 'method = "rtn" and no budget', plain._replace(method="rtn", budget=None)
