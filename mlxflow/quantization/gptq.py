"""GPTQ by mlx-lm's function, one block after the other: memory holds one block and the hidden states of all rows.

mlx-lm's function takes a whole model. The inputs of every layer are those of the dense model, so each block can be
given to it as a model of its own, with the dense model's hidden states as its rows: the codes are the same. On a CPU
the rows are in fp32, so that products with 16-bit weights and the sums of the Hessians are, too.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlxflow.messages.errors import CallError
from mlxflow.models.fp32_on_cpu import widen, widened
from mlxflow.quantization.block_calls import RecordedPass, after_blocks, find_blocks
from mlxflow.quantization.codec import Packed
from mlxflow.quantization.layer_inputs import remove_weights
from mlxflow.quantization.learned_codes import OUTSIDE, WHOLE, BlockStore
from mlxflow.quantization.mlx_lm_patches import (
    NOT_DEFINITE,
    checked_factors,
    following,
    packed_layers,
    precise_hessians,
    quiet,
)
from mlxflow.quantization.plan import quantizable_layers
from mlxflow.quantization.settings import GPTQ_BITS, Setting

_MORE_ROWS = "Calibrate on more rows (calibration_rows)."


def compensated_layers(
    load: Callable[[], nn.Module],
    plan: Mapping[str, Setting],
    tokens: mx.array,
    *,
    batch_size: int,
    store: BlockStore,
    name: str,
) -> dict[str, Packed]:
    """Return the layers of a plan that GPTQ learns.

    A model whose blocks do not each take the output of the one before is learned as a whole, and held in memory with
    the Hessians of all layers; `work_forecast` says so before the start.

    Args:
        load: returns the dense model in eval mode, with lazy weights of its own.
        plan: module path to setting.
        tokens: (R, L) ids to calibrate on.
        batch_size: rows in a forward pass.
        store: of the codes; those of a block that an interrupted run learned are taken.
        name: of the setting, for messages.

    Raises:
        CallError: the Hessian of a layer has no inverse, or codes are not finite.
    """

    def learn(
        block: str,
        model: nn.Module,
        plan: Mapping[str, Setting],
        rows: mx.array | _HiddenBatches,
        whole: Callable[[str], str] = str,
    ) -> dict[str, Packed]:
        if (known := store.codes(block)) is not None:
            return known
        parts = _learned(model, plan, rows, batch_size=batch_size, name=name)
        learned = {whole(path): codes for path, codes in parts.items()}
        _require_finite(learned, name)
        return store.keep_codes(block, learned)

    model = load()
    recorded = find_blocks(model, context_length=tokens.shape[1])
    if isinstance(recorded, str):
        widen(model, at_any_size=True, keeps=plan.keys() - _embeddings(model))
        return learn(WHOLE, model, plan, tokens)
    packed: dict[str, Packed] = {}
    modules = dict(model.named_modules())
    hidden = _HiddenBatches(widened(recorded.embed(tokens)), batch_size)
    for call in recorded.calls:
        block, prefix = modules[call.path], f"{call.path}."
        own = {
            f"part.{path.removeprefix(prefix)}": setting for path, setting in plan.items() if path.startswith(prefix)
        }
        whole = partial(_in_block, prefix)
        packed |= learn(call.path, _PartAsModel(block, call.__call__), own, hidden, whole)
        hidden.replace(partial(call.__call__, block))
        remove_weights(block)
        mx.clear_cache()
    inputs = tokens, hidden.whole()
    return packed | _learned_outside(model, recorded, plan, inputs, learn=learn)


def learned_by_setting(model: nn.Module, plan: Mapping[str, Setting]) -> dict[Setting, list[str]]:
    """Return the paths of the layers that GPTQ learns, by their settings."""
    from mlx_lm.models.switch_layers import SwitchLinear

    paths: dict[Setting, list[str]] = {}
    for path, layer in quantizable_layers(model).items():
        setting = plan.get(path)
        if (
            setting
            and type(layer) in (nn.Linear, SwitchLinear)
            and setting.mode == "affine"
            and setting.bits in GPTQ_BITS
        ):
            paths.setdefault(setting, []).append(path)
    return paths


def _embeddings(model: nn.Module) -> set[str]:
    return {path for path, module in model.named_modules() if isinstance(module, nn.Embedding)}


class _HiddenBatches:
    """Rows in batches that are replaced one by one, so that memory holds them once."""

    def __init__(self, rows: mx.array, size: int) -> None:
        self._size, self._count = size, len(rows)
        self._parts: list[mx.array] = [rows[begin : begin + size] for begin in range(0, len(rows), size)]
        mx.eval(self._parts)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, span: slice) -> mx.array:
        """Return a batch; the span begins with one."""
        part: mx.array = self._parts[span.start // self._size]
        return part

    def replace(self, change: Callable[[mx.array], mx.array]) -> None:
        """Replace each batch by what a function returns for it."""
        for number, part in enumerate(self._parts):
            self._parts[number] = change(part)
            mx.eval(self._parts[number])

    def whole(self) -> mx.array:
        """Return all rows; the batches are emptied."""
        rows = mx.concatenate(self._parts)
        mx.eval(rows)
        self._parts.clear()
        return rows


class _PartAsModel(nn.Module):  # type: ignore[misc]
    """A part of a model as a model of its own.

    Args:
        part: holds the layers.
        run: computes the part on rows of its own inputs.
    """

    def __init__(self, part: Any, run: Callable[[Any, mx.array], mx.array]) -> None:
        super().__init__()
        self.part = part
        self._run = run

    def __call__(self, rows: mx.array) -> mx.array:
        return self._run(self.part, rows)


def _learned(
    model: nn.Module, plan: Mapping[str, Setting], rows: mx.array | _HiddenBatches, *, batch_size: int, name: str
) -> dict[str, Packed]:
    """Return the layers of a model that GPTQ learns from rows, (R, ...), that the model takes."""
    from mlx_lm.quant.gptq import gptq_quantize

    packed: dict[str, Packed] = {}
    for setting, paths in learned_by_setting(model, plan).items():
        own = dict.fromkeys(paths, setting)
        with following(model, own, free=set(paths), hides=True), checked_factors(), precise_hessians(), quiet():
            try:
                bits, group_size = setting.bits, setting.group_size
                gptq_quantize(model, rows, bits, group_size, bits, group_size, batch_size)
            except ValueError as error:
                if "[diag]" in str(error):
                    advice = "Calibrate on longer rows, or set another method"
                    raise CallError(f"{name}: a layer is not computed on the calibration rows. {advice}.") from error
                if str(error) != NOT_DEFINITE:
                    raise
                raise CallError(f"{name}: {error}. Calibrate on more rows (calibration_rows).") from error
            packed |= packed_layers(model, own)
    return packed


def _in_block(prefix: str, path: str) -> str:
    return prefix + path.removeprefix("part.")


def _require_finite(packed: Mapping[str, Packed], name: str) -> None:
    for path, parts in packed.items():
        if not all(mx.isfinite(part).all().item() for part in (parts.scales, parts.biases) if part is not None):
            raise CallError(f"{name}: {path} has scales or biases that are not finite. {_MORE_ROWS}")


def _learned_outside(
    model: nn.Module,
    recorded: RecordedPass,
    plan: Mapping[str, Setting],
    inputs: tuple[mx.array, mx.array],
    *,
    learn: Callable[..., dict[str, Packed]],
) -> dict[str, Packed]:
    """Return the layers after the blocks that GPTQ learns, such as the head.

    Args:
        model: its blocks have no weights any more.
        recorded: the blocks.
        plan: module path to setting.
        inputs: (R, L) ids, and the outputs of the last block, (R, L, D).
        learn: returns the codes of a model's layers, learned from rows; takes a name for them, a model, its plan, the
            rows, and a function from the model's paths to those of the whole model.
    """
    tokens, hidden = inputs
    prefixes = tuple(f"{call.path}." for call in recorded.calls)
    outside = {path: setting for path, setting in plan.items() if not path.startswith(prefixes)}
    paths = [path for some in learned_by_setting(model, outside).values() for path in some]
    if not paths:
        return {}
    modules = dict(model.named_modules())

    def run(layers: Sequence[nn.Module], rows: mx.array) -> mx.array:
        model.update_modules(tree_unflatten(list(zip(paths, layers, strict=True))))
        begin, end = int(rows[0]), int(rows[-1]) + 1
        return after_blocks(model, hidden[begin:end], tokens[begin:end])

    part = _PartAsModel([modules[path] for path in paths], run)
    own = {f"part.{number}": plan[path] for number, path in enumerate(paths)}
    return learn(OUTSIDE, part, own, mx.arange(len(tokens)), lambda path: paths[int(path.removeprefix("part."))])
