"""Make for models: one `workflow.toml`, an incremental and reproducible MLX training workflow.

    from mlxflow import MemoryProfiler, profile_memory, quantize_model_for_inference

What is public is imported when it is asked for, so that `import mlxflow` alone loads no mlx.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlxflow.profiling.profiler import MemoryProfiler, profile_memory
    from mlxflow.quantization.apply import quantize_model_for_inference

__all__ = ["MemoryProfiler", "profile_memory", "quantize_model_for_inference"]

_HOMES = {
    "MemoryProfiler": "mlxflow.profiling.profiler",
    "profile_memory": "mlxflow.profiling.profiler",
    "quantize_model_for_inference": "mlxflow.quantization.apply",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
