"""Quantization plans: rules with patterns are resolved to a setting for each layer, from shapes only."""

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple

import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxflow.messages.errors import WorkflowError
from mlxflow.quantization.codec import is_supported
from mlxflow.quantization.settings import BITS, GROUP_SIZES, Setting, completed, mistakes_in


class Rule(NamedTuple):
    """The setting of the layers that a pattern matches; the first matching rule applies.

    Attributes:
        match: a pattern of module paths, such as `*.mlp.*`.
        skip: whether the layers stay dense.
        mode: None for that of the default.
        bits: None for those of the default, or the mode's usual ones.
        group_size: None for that of the default, or the mode's usual one.
    """

    match: str
    skip: bool = False
    mode: str | None = None
    bits: int | None = None
    group_size: int | None = None


class QuantizationPlan(NamedTuple):
    """A setting for every layer that is quantized, and the layers that stay dense.

    Attributes:
        default: the setting of layers without a rule.
        layers: module path to setting, in the model's order.
        skipped: paths that a rule, or the architecture itself, leaves dense.
        undivided: paths that stay dense because the group size does not divide their width.
    """

    default: Setting
    layers: dict[str, Setting]
    skipped: list[str]
    undivided: list[str]

    def layers_toml(self) -> str:
        """Return the plan as a `layers` table that can be pasted into a `[quantize]` table."""
        entries = [
            f'    {{ match = "{path}", bits = {one.bits}, group_size = {one.group_size}, mode = "{one.mode}" }},'
            for path, one in self.layers.items()
        ]
        entries += [f'    {{ match = "{path}", skip = true }},' for path in self.skipped]
        return "\n".join(["layers = [", *entries, "]"]) + "\n"

    def warning(self, key: str) -> str | None:
        """Return a warning about layers that stay dense because of their widths; None if there are none.

        Args:
            key: of the table with the settings.
        """
        if not self.undivided:
            return None
        listed = ", ".join(self.undivided[:3]) + (", ..." if len(self.undivided) > 3 else "")
        total = len(self.undivided) + len(self.layers) + len(self.skipped)
        return (
            f"{key}: {len(self.undivided)} of {total} layers stay dense, their widths are no multiples of group_size "
            f"{self.default.group_size}: {listed}"
        )

    def config(self) -> dict[str, Any]:
        """Return the table `quantization` of `config.json`.

        It has the default setting, and an entry for every layer with another one.
        """
        used = list(self.layers.values())
        common = self.default if self.default in used else max(used, key=used.count)
        own = {path: setting.stored() for path, setting in self.layers.items() if setting.stored() != common.stored()}
        return {**common.stored(), **own, **dict.fromkeys(self.skipped, False)}


def quantizable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return every layer that MLX can quantize, by path, in the model's order."""
    leaves = tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module)
    return {path: layer for path, layer in leaves if hasattr(layer, "to_quantized")}


def names_key(path: str, rules: Sequence[Rule], key: Literal["bits", "group_size"]) -> bool:
    """Return whether the rule for a path sets its bits, or its group size."""
    rule = next((rule for rule in rules if fnmatchcase(path, rule.match)), None)
    return rule is not None and getattr(rule, key) is not None


def resolve(model: nn.Module, *, default: Setting, rules: Sequence[Rule], key: str) -> QuantizationPlan:
    """Return the plan for a model, from shapes only.

    Layers without a rule are treated as by mlx-lm's converter: if the default's group size does not divide their width
    they stay dense; else the architecture's `quant_predicate` applies, if it has one. It may request 8-bit affine
    routers, for example, in any mode.

    Args:
        model: dense; its weights need not be evaluated.
        default: setting of layers without a rule.
        rules: the first match applies.
        key: of the table with the settings, for the messages; the rules are its `layers`.

    Raises:
        WorkflowError: one line for each rule that matches no layer, or a layer whose width its group size does not
            divide; a setting is not supported by the mode or the installed MLX; the plan quantizes nothing.
    """
    layers = quantizable_layers(model)
    first = {path: next((rule for rule in rules if fnmatchcase(path, rule.match)), None) for path in layers}
    lines = [
        line
        for place, rule in enumerate(rules)
        for line in _mistakes_of(rule, f"{key}.layers[{place}]", default, layers, first)
    ]
    lines += _lacking(default, key)
    if lines:
        raise WorkflowError(*dict.fromkeys(lines))
    plan = QuantizationPlan(default, {}, [], [])
    for path, layer in layers.items():
        rule, width = first[path], layer.weight.shape[-1]
        if rule is None and width % default.group_size:
            plan.undivided.append(path)
            continue
        setting = _setting_of(path, layer, model, default, rule)
        if setting is None:
            plan.skipped.append(path)
        elif width % setting.group_size:
            plan.undivided.append(path)
        else:
            plan.layers[path] = setting
    if not plan.layers:
        raise WorkflowError(_nothing_quantized_message(plan, key, layers))
    return plan


def check_supported(settings: Mapping[str, Setting], key: str) -> None:
    """Check that the installed MLX supports every setting of a plan.

    Raises:
        WorkflowError: names each unsupported setting once.
    """
    lacking = [setting for setting in dict.fromkeys(settings.values()) if not is_supported(setting)]
    if lacking:
        raise WorkflowError(
            *(
                f'{key}: the installed MLX cannot quantize with mode "{one.mode}", bits {one.bits} and group_size '
                f"{one.group_size}. Use another setting, or another version of mlx."
                for one in lacking
            )
        )


def _setting_of(path: str, layer: nn.Module, model: nn.Module, default: Setting, rule: Rule | None) -> Setting | None:
    """Return the setting of a layer; None if it stays dense."""
    if rule is not None:
        return None if rule.skip else _completed(rule, default)
    predicate = getattr(model, "quant_predicate", None)
    request = True if predicate is None else predicate(path, layer)
    if isinstance(request, dict):
        return _own_setting(request, default)
    return default if request else None


def _own_setting(request: Mapping[str, Any], default: Setting) -> Setting:
    """Return the setting that an architecture requests for a layer; without a mode it is affine, as in MLX.

    If the default is symmetric, which MLX does not have, a requested affine layer becomes symmetric.
    """
    mode = "symmetric" if default.mode == "symmetric" else "affine"
    usual = Setting(mode, BITS["affine"][0], GROUP_SIZES["affine"][0], default.narrows_scales)
    return completed(usual, mode=request.get("mode"), bits=request.get("bits"), group_size=request.get("group_size"))


def _completed(rule: Rule, default: Setting) -> Setting:
    return completed(default, mode=rule.mode, bits=rule.bits, group_size=rule.group_size)


def _lacking(setting: Setting, key: str) -> Iterator[str]:
    for one in mistakes_in(setting):
        yield f"{key}.{one.key} = {one.value}: {one.expected}. Set {one.key} = {one.usual}."


def _mistakes_of(
    rule: Rule,
    where: str,
    default: Setting,
    layers: Mapping[str, nn.Module],
    first: Mapping[str, Rule | None],
) -> Iterator[str]:
    if rule.mode is not None and rule.mode not in BITS:
        yield f'{where}.mode = "{rule.mode}": expected one of {", ".join(BITS)}. Use mode = "affine".'
        return
    if not any(fnmatchcase(path, rule.match) for path in layers):
        yield f'{where}.match = "{rule.match}": matches no layer. {_near(rule.match, layers)}'
    if rule.skip:
        return
    setting = _completed(rule, default)
    yield from _lacking(setting, where)
    for path, layer in layers.items():
        width = layer.weight.shape[-1]
        if first[path] is rule and width % setting.group_size:
            yield (
                f'{where}.match = "{rule.match}": group_size {setting.group_size} does not divide the width {width:,} '
                f"of {path}. {_divider(setting, {width}, 'Name')}set skip = true."
            )


def _divider(setting: Setting, widths: Iterable[int], verb: str) -> str:
    """Return the start of the advice: group sizes, of the mode or of another one, that divide some widths."""

    def dividing(mode: str) -> list[int]:
        return sorted(size for size in GROUP_SIZES[mode] if any(width % size == 0 for width in widths))

    if own := dividing(setting.mode):
        return f"{verb} group_size = {' or '.join(map(str, own))}, or "
    other = next((mode for mode in BITS if dividing(mode)), None)
    return f'{verb} mode = "{other}" with group_size = {dividing(other)[-1]}, or ' if other else ""


def _near(pattern: str, layers: Mapping[str, nn.Module]) -> str:
    """Return the advice for a pattern that matches nothing."""
    if fnmatchcase("lm_head", pattern) and any(path.endswith("embed_tokens") for path in layers):
        embedding = next(path for path in layers if path.endswith("embed_tokens"))
        return f"The head of this model is its embedding. Match {embedding}."
    names = {path.rpartition(".")[2]: path for path in layers}
    near = difflib.get_close_matches(pattern.strip("*."), layers, n=1, cutoff=0.6)
    near = near or [names[one] for one in difflib.get_close_matches(pattern.rpartition(".")[2].strip("*"), names, n=1)]
    if near:
        return f"Did you mean {near[0]}?"
    return f"Layers are, for example, {', '.join(dict.fromkeys(names.values()))}."


def _nothing_quantized_message(plan: QuantizationPlan, key: str, layers: Mapping[str, nn.Module]) -> str:
    if not plan.undivided:
        return f"{key}.layers: every layer stays dense, nothing would be quantized. Leave one to be quantized."
    widths = {layers[path].weight.shape[-1] for path in plan.undivided}
    listed = ", ".join(f"{width:,}" for width in sorted(widths))
    advice = _divider(plan.default, widths, "Set").removesuffix(", or ") or "Quantize a model with wider layers"
    return (
        f'{key}: groups of {plan.default.group_size} weights (mode "{plan.default.mode}") divide the width of no layer '
        f"({listed}). {advice}."
    )
