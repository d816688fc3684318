"""Which layer is quantized how: patterns resolved to a table of module paths before any weight is touched."""

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxflow.errors import WorkflowError
from mlxflow.quantization.codec import is_supported
from mlxflow.quantization.settings import BITS, GROUP_SIZES, Setting, completed, mistakes_in


class Rule(NamedTuple):
    """What is said of the layers that a pattern matches; of several that match, the first holds.

    Attributes:
        match: a pattern of module paths, such as `*.mlp.*`.
        skip: whether they stay dense.
        mode: None for the default's.
        bits: None for the default's, or the usual of the mode.
        group_size: likewise.
    """

    match: str
    skip: bool = False
    mode: str | None = None
    bits: int | None = None
    group_size: int | None = None


class QuantizationPlan(NamedTuple):
    """A table of every layer that can be quantized.

    Attributes:
        default: for layers that no rule names.
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
        """Return what to say of layers that stay dense for their widths alone; None where there are none.

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
        """Return the table by which readers build the layers: `quantization` in `config.json`.

        Every layer that is not as the first entries say is named with all that its setting is.
        """
        used = list(self.layers.values())
        common = self.default if self.default in used else max(used, key=used.count)
        own = {path: setting.stored() for path, setting in self.layers.items() if setting.stored() != common.stored()}
        return {**common.stored(), **own, **dict.fromkeys(self.skipped, False)}


def quantizable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return every layer that MLX can quantize by its path, in the model's order."""
    leaves = tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module)
    return {path: layer for path, layer in leaves if hasattr(layer, "to_quantized")}


def names_bits(path: str, rules: Sequence[Rule]) -> bool:
    """Return whether the rule that holds for a path says its bits."""
    rule = next((rule for rule in rules if fnmatchcase(path, rule.match)), None)
    return rule is not None and rule.bits is not None


def resolve(model: nn.Module, *, default: Setting, rules: Sequence[Rule], key: str) -> QuantizationPlan:
    """Return the plan for a model; looks at shapes only.

    Layers that no rule names get what mlx-lm's converter gives them. Where the default's group size does not divide
    their width they stay dense; else the architecture's own `quant_predicate` holds where it has one. It asks for 8-bit
    affine routers, for example, whatever the mode is.

    Args:
        model: dense; its weights need not be evaluated.
        default: of layers that no rule names.
        rules: the first that matches holds.
        key: of the table with the settings, for the messages; the rules are its `layers`.

    Raises:
        WorkflowError: one line for each rule that names no layer, or one whose width its group size does not divide; a
            setting that the mode or the installed MLX does not have; a plan that quantizes nothing.
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
        raise WorkflowError(_word_nothing(plan, key, layers))
    return plan


def check_supported(settings: Mapping[str, Setting], key: str) -> None:
    """Make sure that the installed MLX has every setting of a plan.

    Raises:
        WorkflowError: it has not; each setting is named once.
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
    """Return the setting of a layer; None where it stays dense."""
    if rule is not None:
        return None if rule.skip else _completed(rule, default)
    predicate = getattr(model, "quant_predicate", None)
    said = True if predicate is None else predicate(path, layer)
    if isinstance(said, dict):
        return _own_setting(said, default)
    return default if said else None


def _own_setting(said: Mapping[str, Any], default: Setting) -> Setting:
    """Return what an architecture asks for a layer: affine where it names no mode, as in `to_quantized` of MLX.

    Codes with a fixed zero point are not MLX's, so an architecture cannot ask for them; a table that does gets them.
    """
    usual = Setting(
        "symmetric" if default.mode == "symmetric" else "affine", BITS["affine"][0], GROUP_SIZES["affine"][0]
    )
    return completed(usual, mode=said.get("mode"), bits=said.get("bits"), group_size=said.get("group_size"))


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
    """Return the start of an advice: the group sizes, of the mode or of another one, that divide some width."""

    def dividing(mode: str) -> list[int]:
        return sorted(size for size in GROUP_SIZES[mode] if any(width % size == 0 for width in widths))

    if own := dividing(setting.mode):
        return f"{verb} group_size = {' or '.join(map(str, own))}, or "
    other = next((mode for mode in BITS if dividing(mode)), None)
    return f'{verb} mode = "{other}" with group_size = {dividing(other)[-1]}, or ' if other else ""


def _near(pattern: str, layers: Mapping[str, nn.Module]) -> str:
    """Return what to do about a pattern that matches nothing."""
    if fnmatchcase("lm_head", pattern) and any(path.endswith("embed_tokens") for path in layers):
        embedding = next(path for path in layers if path.endswith("embed_tokens"))
        return f"The head of this model is its embedding. Match {embedding}."
    names = {path.rpartition(".")[2]: path for path in layers}
    near = difflib.get_close_matches(pattern.strip("*."), layers, n=1, cutoff=0.6)
    near = near or [names[one] for one in difflib.get_close_matches(pattern.rpartition(".")[2].strip("*"), names, n=1)]
    if near:
        return f"Did you mean {near[0]}?"
    return f"Layers are, for example, {', '.join(dict.fromkeys(names.values()))}."


def _word_nothing(plan: QuantizationPlan, key: str, layers: Mapping[str, nn.Module]) -> str:
    if not plan.undivided:
        return f"{key}.layers: every layer stays dense, nothing would be quantized. Leave one to be quantized."
    widths = {layers[path].weight.shape[-1] for path in plan.undivided}
    listed = ", ".join(f"{width:,}" for width in sorted(widths))
    advice = _divider(plan.default, widths, "Set").removesuffix(", or ") or "Quantize a model with wider layers"
    return (
        f'{key}: groups of {plan.default.group_size} weights (mode "{plan.default.mode}") divide the width of no layer '
        f"({listed}). {advice}."
    )
