"""Make for models: one `workflow.toml`, an incremental and reproducible MLX training workflow."""

from typing import Any

__all__ = ["MemoryProfiler", "profile_memory"]


def __getattr__(name: str) -> Any:
    """Import what is public when it is asked for: `import mlxflow` alone loads no mlx."""
    if name in __all__:
        from mlxflow.measurement import memory

        return getattr(memory, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
