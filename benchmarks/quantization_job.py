"""The dense model of the benchmarks of quantization: its training, its tokens, perplexities of quantized copies."""

import copy
import json
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WORKFLOW = """
[workflow]
device = "cpu"
[pretokenize]
context_length = 128
tokenizer = { vocab_size = 1024 }
[train]
num_steps = 2000
batch_size = 16
dynamic_batch_size = false
learning_rate = 6e-3
warmup_steps = 100
[train.model]
hidden_size = 128
num_layers = 4
num_heads = 4
num_kv_heads = 4
intermediate_size = 384
tie_word_embeddings = false
"""
STEPS, BATCH, CALIBRATION = 300, 16, 64


def print_row(row: str, **figures: Any) -> None:
    """Print one line of JSON; floats have four decimals."""
    shown = {name: round(figure, 4) if isinstance(figure, float) else figure for name, figure in figures.items()}
    print(json.dumps({"row": row} | shown), flush=True)


def _qat_settings(model: Any, **table: Any) -> Any:
    """Return the settings by which a `[quantize]` table with `method = "qat"` trains."""
    from mlxflow.quantization import table_requests
    from mlxflow.quantization.aware_training import suited
    from mlxflow.stages import quantize

    config = quantize.Config(method="qat", **table)
    settings = table_requests.written_settings(config, num_rows=1)
    return suited(settings, model, learning_rate=config.learning_rate, trains_grids=False, rate_share=1.0)


class Job:
    """The dense model, its tokens, and the perplexity on held-out ones."""

    def __init__(self, folder: str, *, held_out: int = 400) -> None:
        import mlx.core as mx

        from mlxflow.data.token_file import TokenFile
        from mlxflow.quantization.calibration_text import choose_text

        self._folder = Path(folder) / "artifacts"
        self.tokens = TokenFile.open(self._folder / "pretokenize" / "train.safetensors")
        self._held_out = TokenFile.open(self._folder / "pretokenize" / "validation.safetensors").rows.head(held_out)
        rows = self.tokens.rows
        batch = choose_text(rows, count=CALIBRATION, seed=0)
        self.calibration, self.marks = mx.array(batch.tokens.astype("int32")), mx.array(batch.marks)

    def model(self) -> Any:
        """Return the dense model, loaded again."""
        from mlxflow.models import model_folder

        return model_folder.load(self._folder / "train")[0]

    def another(self, seed: int) -> Any:
        """Return a dense model of the same shape, trained in the same way from other numbers and in another order."""
        from mlxflow.models import model_folder
        from mlxflow.stages import train

        table = tomllib.loads(WORKFLOW)["train"]
        table = {key: table[key] for key in ("num_steps", "batch_size", "learning_rate", "warmup_steps")}
        model = model_folder.build(json.loads((self._folder / "train" / "config.json").read_text()), seed=seed)
        self._train(model, train.Config(**table), seed=seed)
        return model

    def perplexity(self, model: Any) -> float:
        """Return the perplexity of a model on the held-out rows."""
        from mlxflow.evaluation.perplexity import measure_perplexity

        return measure_perplexity(model, self._held_out, batch_size=50).perplexity

    def perplexity_of(self, model: Any, packed: Any, plan: Any) -> float:
        """Return the perplexity of packed layers; the model's weights are replaced."""
        import mlx.core as mx

        from mlxflow.quantization.codec import unpack

        weights = [(f"{path}.weight", unpack(packed[path], plan[path]).astype(mx.float32)) for path in plan]
        model.load_weights(weights, strict=False)
        return self.perplexity(model)

    def rounded(self, model: Any, plan: Any, dtype: Any = None) -> float:
        """Return the perplexity of rounding to nearest; the model stays as it was."""
        from mlxflow.quantization.codec import pack

        one = copy.deepcopy(model)
        layers = dict(one.named_modules())
        weights = {path: layers[path].weight for path in plan}
        packed = {path: pack(weights[path].astype(dtype or weights[path].dtype), plan[path]) for path in plan}
        return self.perplexity_of(one, packed, plan)

    @contextmanager
    def trained(
        self, model: Any, plan: Any, *, steps: int = STEPS, seed: int = 1, **table: Any
    ) -> Iterator[tuple[Any, list[float]]]:
        """Train a model as `method = "qat"` does, with fake quantization where there is a plan.

        Args:
            model: dense.
            plan: of the layers; empty for a control.
            steps: of training.
            seed: of the order of the rows.
            table: what else the `[quantize]` table says.

        Yields:
            The packing function, and the seconds of every step.
        """
        from mlxflow.quantization.fake_quant import fake_quantized

        with fake_quantized(model, plan) as packed:
            settings = _qat_settings(model, num_steps=steps, batch_size=BATCH, **table)
            yield packed, self._train(model, settings, seed=seed)

    def continued(self, model: Any, *, seed: int) -> None:
        """Train a model on as `[train]` would by its own defaults, as long and as fast as the quantize table has it."""
        from mlxflow.stages import train
        from mlxflow.training import table_settings

        rate = _qat_settings(model, num_steps=STEPS).learning_rate
        config = train.Config(num_steps=STEPS, batch_size=BATCH, learning_rate=rate, warmup_steps=STEPS // 10)
        self._train(model, table_settings.training_settings(config, STEPS), seed=seed)

    def _train(self, model: Any, settings: Any, *, seed: int) -> list[float]:
        """Train a model; return the seconds of every step."""
        import mlx.core as mx

        from mlxflow.kernels import model_kernels
        from mlxflow.training import build

        model.train()
        seconds = []
        settings = settings.replace(fused_loss=True, workers=1)
        subject = build.Subject(model, settings, self.tokens.vocab_size, self.tokens.context_length)
        with (
            build.ready_step(subject, model_kernels.no_kernels()) as step,
            build.make_loader(self.tokens.rows, settings, num_rows=BATCH, seed=seed) as loader,
        ):
            for _ in range(settings.num_steps):
                batch = next(loader)
                begin = time.perf_counter()
                mx.eval(*step.update(step.compute(batch.tokens, batch.marks)), step.state)
                seconds.append(time.perf_counter() - begin)
        model.eval()
        return seconds


def uniform_plan(model: Any, mode: str, bits: int, group_size: int = 64) -> dict[str, Any]:
    """Return the same setting for every layer that can be quantized, by its path."""
    from mlxflow.quantization.settings import Setting

    setting = Setting(mode, bits, group_size)
    return {path: setting for path, layer in model.named_modules() if hasattr(layer, "to_quantized")}
