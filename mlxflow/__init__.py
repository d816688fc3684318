"""Make for models: one `workflow.toml`, an incremental and reproducible MLX training workflow.

    from mlxflow import MemoryProfiler, profile_memory, quantize_model_for_inference

The public names are imported on first use, so that `import mlxflow` alone loads no mlx; docs/reference/python-api.md
describes them.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlxflow.data.loader import Loader
    from mlxflow.data.token_file import TokenFile
    from mlxflow.evaluation.perplexity import measure_perplexity as perplexity
    from mlxflow.messages.errors import MlxflowError
    from mlxflow.profiling.profiler import MemoryProfiler, profile_memory
    from mlxflow.quantization.apply import apply_plan, quantize_model_for_inference
    from mlxflow.training.batches import TrainingData
    from mlxflow.training.build import Subject, make_data, prepare_model, ready_step, ready_trainer
    from mlxflow.training.checkpoints import CheckpointStore
    from mlxflow.training.settings import TrainingSettings
    from mlxflow.training.trainer import Session, Trainer
    from mlxflow.workflow.execution import run_stage
    from mlxflow.workflow.loader import load_workflow

__all__ = [
    "CheckpointStore",
    "Loader",
    "MemoryProfiler",
    "MlxflowError",
    "Session",
    "Subject",
    "TokenFile",
    "Trainer",
    "TrainingData",
    "TrainingSettings",
    "__version__",
    "apply_plan",
    "load_workflow",
    "make_data",
    "perplexity",
    "prepare_model",
    "profile_memory",
    "quantize_model_for_inference",
    "ready_step",
    "ready_trainer",
    "run_stage",
]

__version__: str

#: Module and name of each public name.
_HOMES = {
    "CheckpointStore": ("mlxflow.training.checkpoints", "CheckpointStore"),
    "Loader": ("mlxflow.data.loader", "Loader"),
    "MemoryProfiler": ("mlxflow.profiling.profiler", "MemoryProfiler"),
    "MlxflowError": ("mlxflow.messages.errors", "MlxflowError"),
    "Session": ("mlxflow.training.trainer", "Session"),
    "Subject": ("mlxflow.training.build", "Subject"),
    "TokenFile": ("mlxflow.data.token_file", "TokenFile"),
    "Trainer": ("mlxflow.training.trainer", "Trainer"),
    "TrainingData": ("mlxflow.training.batches", "TrainingData"),
    "TrainingSettings": ("mlxflow.training.settings", "TrainingSettings"),
    "apply_plan": ("mlxflow.quantization.apply", "apply_plan"),
    "load_workflow": ("mlxflow.workflow.loader", "load_workflow"),
    "make_data": ("mlxflow.training.build", "make_data"),
    "perplexity": ("mlxflow.evaluation.perplexity", "measure_perplexity"),
    "prepare_model": ("mlxflow.training.build", "prepare_model"),
    "profile_memory": ("mlxflow.profiling.profiler", "profile_memory"),
    "quantize_model_for_inference": ("mlxflow.quantization.apply", "quantize_model_for_inference"),
    "ready_step": ("mlxflow.training.build", "ready_step"),
    "ready_trainer": ("mlxflow.training.build", "ready_trainer"),
    "run_stage": ("mlxflow.workflow.execution", "run_stage"),
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("mlxflow")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
