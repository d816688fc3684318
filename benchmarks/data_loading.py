"""Batches gathered, awaited, and trained with: the loader beside a copy of the same bytes and PyTorch's DataLoader."""

import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def _rows(count: int, length: int, folder: Path) -> Any:
    from mlxflow.data.token_file import Rows
    from mlxflow.storage.tensor_reading import map_tensor
    from mlxflow.storage.tensor_writing import write_arrays

    path = folder / f"rows-{length}.safetensors"
    tokens = np.random.default_rng(0).integers(0, 2048, (count, length)).astype(np.uint16)
    write_arrays(path, {"tokens": tokens, "marks": np.full((count, length), 3, np.uint8)}, {})
    return Rows(map_tensor(path, "tokens"), map_tensor(path, "marks"))


def _microseconds(act: Callable[[int], object], count: int) -> float:
    begin = time.perf_counter()
    for number in range(count):
        act(number)
    return (time.perf_counter() - begin) / count * 1e6


def time_loading(folder: Path) -> None:
    """Gather batches, wait for them, and train with them."""
    from mlxflow.device import cpu_backend

    cpu_backend.prepare()
    import mlx.core as mx

    from mlxflow.data.loader import Loader, Order

    for count, length, batch_size in ((170_000, 513, 32), (42_000, 2049, 64)):
        rows = _rows(count, length, folder)
        order = Order(rows.num_rows, seed=0)
        plain = rows.take(np.arange(batch_size))
        places: list[NDArray[np.int64]] = [order.rows(i * batch_size, batch_size) for i in range(400)]
        acts: dict[str, Callable[[int], object]] = {
            "copy of the same bytes": lambda i, p=plain: (p.tokens.copy(), p.marks.copy()),  # type: ignore[misc]
            "batch on the host": lambda i, r=rows, o=order, b=batch_size: r.take(o.rows(i * b, b)),  # type: ignore[misc]
            "batch as MLX arrays": lambda i, r=rows, p=places: mx.eval([mx.array(x) for x in r.take(p[i])]),  # type: ignore[misc]
        }
        items = _torch_items(rows, batch_size)
        if items is not None:
            acts["torch DataLoader over items"] = items
        found: dict[str, list[float]] = {name: [] for name in acts}
        for _ in range(9):
            for name, act in random.sample(list(acts.items()), len(acts)):
                found[name].append(_microseconds(act, 300 if "torch" not in name else 30))
        base = statistics.median(found["copy of the same bytes"])
        for name, rounds in found.items():
            median = statistics.median(rounds)
            print(f"{batch_size} x {length}  {name:28} {median:8.1f} us  {median / base:6.1f} x a copy")
        _wait(rows, batch_size, Loader)
    _train(folder)


def _torch_items(rows: Any, batch_size: int) -> Callable[[int], object] | None:
    try:
        import torch
    except ImportError:
        return None

    class Items(torch.utils.data.Dataset):  # type: ignore[misc]
        def __len__(self) -> int:
            return int(rows.num_rows)

        def __getitem__(self, index: int) -> Any:
            return torch.from_numpy(rows.tokens[index].astype(np.int32))

    batches = iter(torch.utils.data.DataLoader(Items(), batch_size=batch_size, shuffle=True))
    next(batches)
    return lambda _: next(batches)


def _wait(rows: Any, batch_size: int, loader_class: Any) -> None:
    """Wait for batches in a loop with a step of 15 ms."""
    with loader_class(rows, batch_size=batch_size, seed=0, workers=8, prefetch_batches=4) as loader:
        next(loader)
        begin, waited = time.perf_counter(), loader.waited_seconds
        fetched = 0.0
        for _ in range(100):
            before = time.perf_counter()
            next(loader)
            fetched += time.perf_counter() - before
            time.sleep(0.015)
        seconds = time.perf_counter() - begin
    print(
        f"{batch_size} x {rows.tokens.shape[1]}  15 ms steps: waited "
        f"{(loader.waited_seconds - waited) / 100 / 0.015:.3%} of a step, whole call {fetched / 100 / 0.015:.2%}; "
        f"{100 / seconds:.1f} of 66.7 steps a second"
    )


def _train(folder: Path) -> None:
    """Train with the loader and on one batch that is on the device already, in turns."""
    import mlx.core as mx
    import mlx.optimizers as optim

    from mlxflow.data.loader import Loader
    from mlxflow.models import model_folder
    from mlxflow.models.new_model import ModelConfig, llama_config
    from mlxflow.training.objective import plain_objective
    from mlxflow.training.step import Step
    from mlxflow.training.update import Update

    is_gpu = mx.default_device() == mx.gpu  # there a model whose step takes about 15 ms
    context_length, width, num_layers = (512, 512, 8) if is_gpu else (64, 128, 2)
    rows = _rows(20_000, context_length + 1, folder)
    config = llama_config(
        ModelConfig(
            hidden_size=width,
            num_layers=num_layers,
            num_heads=width // 64,
            num_kv_heads=width // 64,
            intermediate_size=2 * width,
        ),
        vocab_size=2048,
        context_length=context_length,
    )
    model = model_folder.build(config, seed=0)
    update = Update(model, optim.AdamW(1e-4), max_grad_norm=1.0, has_masters=False)
    step = Step(model, update, plain_objective(masks_documents=False))
    ratios, waits = [], []
    with Loader(rows, batch_size=32, seed=0, workers=8, prefetch_batches=4) as loader:
        fixed = next(loader)

        def seconds(next_batch: Callable[[], Any]) -> float:
            begin = time.perf_counter()
            for _ in range(8):
                batch = next_batch()
                outcome = step.update(step.compute(batch.tokens, batch.marks))
                mx.async_eval(outcome, step.state)
            mx.eval(step.state)
            return time.perf_counter() - begin

        seconds(lambda: fixed)
        step_seconds = seconds(lambda: fixed) / 8
        for number in range(14):
            waited = loader.waited_seconds
            if number % 2:
                loaded, repeated = seconds(lambda: next(loader)), seconds(lambda: fixed)
            else:
                repeated, loaded = seconds(lambda: fixed), seconds(lambda: next(loader))
            ratios.append(repeated / loaded)
            waits.append((loader.waited_seconds - waited) / loaded)
    print(
        f"training steps ({step_seconds * 1e3:.1f} ms) a second with the loader: {statistics.median(ratios):.4f} of "
        f"those on one repeated batch (rounds {min(ratios):.3f} to {max(ratios):.3f}); "
        f"waiting {statistics.median(waits):.3%} of the time"
    )
