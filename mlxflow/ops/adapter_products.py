"""LoRA layers beside frozen weights: groups that read one array share its products, and sums lie within products.

mlx-lm's layer computes `linear(x) + scale * (x @ a) @ b` layer by layer: the second product is written, scaled, and
added to what the layer wrote, and the gradient of x is added up from two arrays for each layer. Here the layers that
read the same array, such as queries, keys and values, compute `x @ [a, ...]` in one product; the second product adds to
the output of the frozen layer within the product (`mx.addmm`), and so do the products of the gradient of x.

The gradient recomputes `x @ a`, which is thin, instead of keeping it: with gradient checkpointing a layer whose output
nothing else needs, such as the down projection, is then not computed a second time.
"""

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn

from mlxflow.ops import patching, quantized_matmul
from mlxflow.ops.custom_function import custom_function
from mlxflow.ops.eval_mode import evaluating
from mlxflow.ops.quantized_matmul import Format, IsFasterDense


class _FrozenBase(NamedTuple):
    """A frozen layer beside which an adapter lies, and how it is multiplied.

    Attributes:
        form: of a quantized weight; None for a dense one.
        arrays: number of arrays of the weight.
        has_bias: whether the product has a bias.
        is_dense: whether a quantized weight is multiplied through a dense copy: forward, and for the gradient.
        scale: of the adapter.
    """

    form: Format | None
    arrays: int
    has_bias: bool
    is_dense: tuple[bool, bool]
    scale: float


def find_groups(model: nn.Module, tokens: mx.array) -> list[tuple[nn.Module, ...]]:
    """Return the LoRA layers of a model, each with those that read the same array and are called right after it.

    Layers that are called more than once in a pass are left out.

    Args:
        model: called once in eval mode; nothing is evaluated.
        tokens: (B, L) ids for that call.
    """
    kinds = _kinds(model)
    calls: list[tuple[nn.Module, mx.array]] = []

    def noting(plain: Callable[..., mx.array]) -> Callable[..., mx.array]:
        def noted(layer: Any, x: mx.array) -> mx.array:
            calls.append((layer, x))
            return plain(layer, x)

        return noted

    if not kinds:
        return []
    with (
        patching.attributes(*((kind, "__call__", noting(kind.__call__)) for kind in kinds), by=__name__),
        evaluating(model),
    ):
        model(tokens)
    times = Counter(id(layer) for layer, _ in calls)
    groups = [tuple(layer for layer, _ in group) for _, group in itertools.groupby(calls, key=lambda call: id(call[1]))]
    return [group for group in groups if all(times[id(layer)] == 1 for layer in group)]


def _kinds(model: nn.Module) -> list[Any]:
    """Return the classes of a model's LoRA layers beside matrices."""
    return list({type(layer): None for layer in model.modules() if _is_lora(layer)})


def _is_lora(layer: nn.Module) -> bool:
    return type(layer).__name__ == "LoRALinear" and "lora_a" in layer and "linear" in layer


@contextmanager
def replaced_adapters(groups: Sequence[tuple[nn.Module, ...]], is_faster_dense: IsFasterDense) -> Iterator[None]:
    """Replace the calls of LoRA layers in what is traced until the block ends.

    Layers with dropout, with a base that is trained or of another dtype than their input are left as they are.

    Args:
        groups: of `find_groups`.
        is_faster_dense: decides how a quantized weight is multiplied.
    """
    first_of = {id(group[0]): group for group in groups}
    waiting: dict[int, tuple[mx.array, mx.array]] = {}

    def replacing(plain: Callable[..., mx.array]) -> Callable[..., mx.array]:
        def call(layer: Any, x: mx.array) -> mx.array:
            given, result = waiting.pop(id(layer), (None, None))
            if result is not None and given is x:
                return result
            group = first_of.get(id(layer), ())
            if not group or x.ndim < 2 or not all(_is_supported(member, x) for member in group):
                return plain(layer, x)
            outputs = _group_outputs(group, x, is_faster_dense)
            waiting.update({id(member): (x, output) for member, output in zip(group, outputs, strict=True)})
            return waiting.pop(id(layer))[1]

        return call

    kinds = {type(layer): None for group in groups for layer in group}
    with patching.attributes(*((kind, "__call__", replacing(kind.__call__)) for kind in kinds), by=__name__):
        yield


def _is_supported(layer: Any, x: mx.array) -> bool:
    base = layer.linear
    is_kept = layer.dropout._p_1 == 1 or not layer.dropout.training
    is_frozen = type(base) in (nn.Linear, nn.QuantizedLinear) and not base.trainable_parameters()
    dtypes = {layer.lora_a.dtype, layer.lora_b.dtype, *([base.weight.dtype] if type(base) is nn.Linear else [])}
    return bool(is_kept and is_frozen and dtypes == {x.dtype})


def _group_outputs(group: Sequence[Any], x: mx.array, is_faster_dense: IsFasterDense) -> list[mx.array]:
    bases: list[_FrozenBase] = []
    arrays: list[mx.array] = []
    for layer in group:
        base = layer.linear
        weight = [base.weight]
        form, is_dense = None, (False, False)
        if isinstance(base, nn.QuantizedLinear):
            weight += [base.scales, *([] if base.get("biases") is None else [base.biases])]
            form = Format(base.group_size, base.bits, base.mode)
            is_dense = is_faster_dense(x, base.weight, True, form), is_faster_dense(x, base.weight, False, form)
        bias = [base.bias] if "bias" in base else []
        bases.append(_FrozenBase(form, len(weight), bool(bias), is_dense, float(layer.scale)))
        arrays += [layer.lora_a, layer.lora_b, *weight, *bias]
    outputs: Any = _adapted(tuple(bases), str(x.dtype))(x, *arrays)
    return list(outputs)


class _AdapterLayer(NamedTuple):
    """The arrays of one layer of a group."""

    base: _FrozenBase
    a: mx.array
    b: mx.array
    weight: tuple[mx.array, ...]
    bias: mx.array | None


def _members(bases: Sequence[_FrozenBase], arrays: Sequence[mx.array]) -> list[_AdapterLayer]:
    members, rest = [], list(arrays)
    for base in bases:
        a, b, *rest = rest
        weight, rest = tuple(rest[: base.arrays]), rest[base.arrays :]
        bias = rest.pop(0) if base.has_bias else None
        members.append(_AdapterLayer(base, a, b, weight, bias))
    return members


@functools.cache
def _adapted(bases: tuple[_FrozenBase, ...], _: str) -> Callable[..., list[mx.array]]:
    """Return a function of x and the arrays of each layer, with the gradients of x and the adapters."""

    @custom_function
    def outputs(x: mx.array, *arrays: mx.array) -> list[mx.array]:
        members = _members(bases, arrays)
        thin = _thin_products(x, members)
        results: list[mx.array] = []
        for member, z in zip(members, thin, strict=True):
            y = _product(x, member, transpose=True, after=results[-1] if results else x)
            if member.bias is not None:
                y = y + member.bias
            results.append(mx.addmm(y, z, member.b, alpha=member.base.scale))
        return results

    @outputs.vjp
    def gradients(primals: tuple[mx.array, ...], incoming: list[mx.array], _: list[mx.array]) -> tuple[mx.array, ...]:
        x, *arrays = primals
        members = _members(bases, arrays)
        thin = _thin_products(x, members)
        into_thin = [(g @ member.b.T) * member.base.scale for member, g in zip(members, incoming, strict=True)]
        joined = mx.concatenate(into_thin, axis=-1)
        dx = joined @ mx.concatenate([member.a for member in members], axis=1).T
        for member, g in zip(members, incoming, strict=True):
            dx = _product(g, member, transpose=False, after=dx, plus=dx)
        ends = list(itertools.accumulate(member.a.shape[1] for member in members))
        da = list(mx.split(_rows(x).T @ _rows(joined), ends[:-1], axis=1))
        db = [(_rows(z) * member.base.scale).T @ _rows(g) for member, g, z in zip(members, incoming, thin, strict=True)]
        results = mx.depends([dx], [*da, *db])  # else MLX computes them late, and holds what they are computed from
        for member, of_a, of_b in zip(members, da, db, strict=True):
            others = (*member.weight, *([] if member.bias is None else [member.bias]))
            results += [of_a, of_b, *map(mx.zeros_like, others)]
        return tuple(results)

    return cast("Callable[..., list[mx.array]]", outputs)


def _thin_products(x: mx.array, members: Sequence[_AdapterLayer]) -> list[mx.array]:
    """Return `x @ a` for each layer, by one product."""
    if len(members) == 1:
        return [x @ members[0].a]
    ends = list(itertools.accumulate(member.a.shape[1] for member in members))
    joined = x @ mx.concatenate([member.a for member in members], axis=1)
    return list(mx.split(joined, ends[:-1], axis=-1))


def _product(
    x: mx.array, member: _AdapterLayer, *, transpose: bool, after: mx.array, plus: mx.array | None = None
) -> mx.array:
    """Return the product of rows with a frozen weight, plus an array, once another one is known."""
    base = member.base
    if base.form is None:
        weight = member.weight[0].T if transpose else member.weight[0]
        return x @ weight if plus is None else mx.addmm(plus, x, weight)
    if base.is_dense[0 if transpose else 1]:
        codes, *scales = member.weight
        weights = (mx.depends([codes], [after])[0], *scales)
        return quantized_matmul.multiply(x, weights, base.form, transpose=transpose, plus=plus)
    packed_codes, packed_scales = member.weight[:2]
    biases = member.weight[2] if base.arrays > 2 else None
    result: mx.array = mx.quantized_matmul(x, packed_codes, packed_scales, biases, transpose, **base.form._asdict())
    return result if plus is None else plus + result


def _rows(x: mx.array) -> mx.array:
    return x.reshape(-1, x.shape[-1])
