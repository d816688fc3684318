"""Measure the memory of an MLX program by phase; nothing else of mlxflow is needed."""

import mlx.core as mx
from mlx import nn

from mlxflow import MemoryProfiler, profile_memory

model = nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 256))
mx.eval(model.parameters())
batch = mx.random.normal((64, 256))


def loss(model: nn.Module, batch: mx.array) -> mx.array:
    """Return the mean squared error of reconstructing a batch, (B, D)."""
    return mx.mean((model(batch) - batch) ** 2)


profiler = MemoryProfiler()
with profiler.sampling():
    for _ in range(3):
        with profile_memory(profiler, "forward"):
            mx.eval(loss(model, batch))
        with profile_memory(profiler, "training_step"):
            mx.eval(nn.value_and_grad(model, loss)(model, batch))
        profiler.end_step()

for name, total in profiler.totals.items():
    print(f"{name}: {total.peak_memory_bytes / 1e6:.1f} MB at its peak, {total.seconds * 1000:.1f} ms in all")
print(f"the whole program: {profiler.peak_memory_bytes / 1e6:.1f} MB")
profiler.close()
