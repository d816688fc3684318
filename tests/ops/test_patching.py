"""Replacements of MLX's operations: made, listed and undone in one place; every user of it is listed here."""

import ast
import functools
import importlib
import sys
import tempfile
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm import server
from mlx_lm.models import activations, base, llama
from mlx_lm.quant import dwq
from mlx_lm.tuner import lora

from benchmarks.architecture_configs import config_of
from mlxflow.distributed.team import SOLO
from mlxflow.evaluation import model_server
from mlxflow.evaluation.model_body import Body
from mlxflow.evaluation.streamed_model import StreamedModel
from mlxflow.kernels import layer_patching
from mlxflow.kernels.registry import recorded
from mlxflow.models import config_fields, trial_calls
from mlxflow.ops import (
    adapter_products,
    attention_overrides,
    document_mask,
    gather_matmul,
    graph_trace,
    linear_gradients,
    mlx_lm_import,
    patching,
    quantized_matmul,
)
from mlxflow.ops.copying_products import copying_products
from mlxflow.ops.gradient_checkpointing import recomputed
from mlxflow.ops.patching import Replacement, active
from mlxflow.ops.swiglu_cpu import replaced_swiglu
from mlxflow.quantization.awq import scale_and_clip
from mlxflow.quantization.block_calls import record_blocks
from mlxflow.quantization.codec import Packed, pack
from mlxflow.quantization.fake_quant import fake_quantized
from mlxflow.quantization.grid_training import grids_in_training
from mlxflow.quantization.layer_inputs import input_products
from mlxflow.quantization.mlx_lm_patches import checked_factors, dense_products, following
from mlxflow.quantization.resumable_dwq import without_first_batches
from mlxflow.quantization.settings import Setting
from mlxflow.training.frozen_shards import FrozenShards
from mlxflow.training.output_head import find_head
from mlxflow.training.sharded_layers import ShardedLayers
from tests.conftest import REPOSITORY

TOKENS = mx.arange(1, 9)[None]
SETTING = Setting(mode="affine", bits=4, group_size=32)

Block = AbstractContextManager[Any]


def _model() -> nn.Module:
    config = config_of("llama")
    model = llama.Model(llama.ModelArgs.from_dict(config))
    model.eval()
    mx.eval(model.parameters())
    return model


def _kernels(model: nn.Module) -> Block:
    layers = layer_patching.find_layers(model)
    names = [pattern.kernel_name(layer, mx.float16) for layer, pattern in layers]
    return layer_patching.patched(layers, recorded(names, names), mx.float16)


def _quantized(model: nn.Module) -> nn.Module:
    nn.quantize(model, group_size=32, bits=4)
    return model


def _packed(model: nn.Module) -> dict[str, Packed]:
    return {path: pack(dict(model.named_modules())[path].weight, setting) for path, setting in _plan(model).items()}


def _plan(model: nn.Module) -> dict[str, Setting]:
    return {path: SETTING for path, layer in model.named_modules() if isinstance(layer, nn.Linear)}


def _noting_body(model: nn.Module) -> Block:
    body = Body(model, "model")
    assert body._module is not None
    return body._module.noting()


def _learn(model: nn.Module) -> None:
    with tempfile.TemporaryDirectory() as folder:
        scale_and_clip(model, _plan(model), TOKENS, search_steps=2, folder=Path(folder) / "a", watch=lambda _: None)


ATTENTION = "mlx.core.fast.scaled_dot_product_attention"
MASK = "mlx_lm.models.base.create_causal_mask"
LAYERS = "mlx.nn.layers"


def _adapters() -> Block:
    layer = lora.LoRALinear.from_base(nn.Linear(4, 4))
    return adapter_products.replaced_adapters([(layer,)], lambda *_: False)


#: The blocks that replace something: module, how to enter one, and what is replaced, without repetitions.
BLOCKS: list[tuple[str, Callable[[nn.Module], Block], set[str]]] = [
    ("mlxflow.ops.attention_overrides", lambda _: attention_overrides.causal_by_blocks(), {ATTENTION}),
    ("mlxflow.ops.document_mask", lambda _: document_mask.noted_bounds(), {MASK}),
    (
        "mlxflow.ops.linear_gradients",
        lambda _: linear_gradients.replaced_products(),
        {f"{LAYERS}.linear.Linear.__call__", f"{LAYERS}.embedding.Embedding.as_linear"},
    ),
    (
        "mlxflow.ops.linear_gradients",
        lambda _: linear_gradients.ordered_lookups(),
        {f"{LAYERS}.embedding.Embedding.__call__"},
    ),
    (
        "mlxflow.models.trial_calls",
        lambda _: trial_calls.embeddings_of(mx.zeros((1,), mx.int32)),
        {f"{LAYERS}.embedding.Embedding.__call__", f"{LAYERS}.quantized.QuantizedEmbedding.__call__"},
    ),
    (
        "mlxflow.ops.swiglu_cpu",
        lambda _: replaced_swiglu(),
        {"mlx_lm.models.activations.swiglu", "mlx_lm.models.llama.swiglu"},
    ),
    (
        "mlxflow.ops.gradient_checkpointing",
        lambda model: recomputed(model, every=1),
        {"class of mlx_lm.models.llama.TransformerBlock", "class of mlx_lm.models.llama.MLP"},
    ),
    (
        "mlxflow.ops.copying_products",
        lambda _: copying_products(),
        {
            f"{LAYERS}.linear.Linear.__call__",
            f"{LAYERS}.quantized.QuantizedLinear.__call__",
            f"{LAYERS}.embedding.Embedding.as_linear",
            f"{LAYERS}.quantized.QuantizedEmbedding.as_linear",
            "mlx_lm.tuner.dora.DoRALinear.__call__",
            "mlx_lm.tuner.lora.LoRALinear.__call__",
        },
    ),
    (
        "mlxflow.training.sharded_layers",
        lambda model: ShardedLayers(model, SOLO).installed(),
        {"class of mlx_lm.models.llama.TransformerBlock"},
    ),
    (
        "mlxflow.training.frozen_shards",
        lambda model: FrozenShards(model, SOLO).installed(),
        {"class of mlx_lm.models.llama.TransformerBlock"},
    ),
    ("mlxflow.ops.adapter_products", lambda _: _adapters(), {"mlx_lm.tuner.lora.LoRALinear.__call__"}),
    (
        "mlxflow.ops.quantized_matmul",
        lambda _: quantized_matmul.replaced(quantized_matmul.is_faster_on_cpu),
        {"mlx.core.quantized_matmul"},
    ),
    (
        "mlxflow.kernels.layer_patching",
        _kernels,
        {
            f"class of {LAYERS}.normalization.RMSNorm",
            f"class of {LAYERS}.embedding.Embedding",
            f"class of {LAYERS}.positional_encoding.RoPE",
            "class of mlx_lm.models.llama.MLP",
            "class of mlx_lm.models.llama.TransformerBlock",
        },
    ),
    (
        "mlxflow.quantization.fake_quant",
        lambda model: fake_quantized(model, _plan(model)),
        {f"class of {LAYERS}.linear.Linear"},
    ),
    (
        "mlxflow.quantization.grid_training",
        lambda model: grids_in_training(model, _plan(model), _packed(model), trains_codes=False),
        {f"class of {LAYERS}.linear.Linear"},
    ),
    (
        "mlxflow.quantization.mlx_lm_patches",
        lambda model: following(model, _plan(model), free=set(), hides=False),
        {f"class of {LAYERS}.linear.Linear", f"class of {LAYERS}.embedding.Embedding"},
    ),
    (
        "mlxflow.quantization.mlx_lm_patches",
        lambda model: dense_products(_quantized(model)),
        {f"class of {LAYERS}.quantized.QuantizedLinear", f"class of {LAYERS}.quantized.QuantizedEmbedding"},
    ),
    (
        "mlxflow.quantization.resumable_dwq",
        lambda _: without_first_batches([], 1),
        {"mlx_lm.quant.dwq.iterate_batches"},
    ),
    ("mlxflow.quantization.mlx_lm_patches", lambda _: checked_factors(), {"mlx.core.linalg.cholesky"}),
    (
        "mlxflow.evaluation.model_server",
        lambda _: model_server.bound_to_one_model(),
        {"mlx_lm.server.ModelProvider", "mlx_lm.server.ResponseGenerator"},
    ),
    (
        "mlxflow.evaluation.streamed_model",
        lambda model: StreamedModel(lambda: model).passes(),
        {"class of mlx_lm.models.llama.TransformerBlock"},
    ),
    ("mlxflow.evaluation.model_body", _noting_body, {"class of mlx_lm.models.llama.LlamaModel"}),
    (
        "mlxflow.models.config_fields",
        lambda _: config_fields.Guarded(None, None, "config.json")._checking(),
        {"mlx_lm.models.base.BaseModelArgs.from_dict"},
    ),
]

#: The functions that replace something while they run: module, call, and what is replaced.
CALLS: list[tuple[str, Callable[[nn.Module], Any], set[str]]] = [
    (
        "mlxflow.ops.linear_gradients",
        lambda model: linear_gradients.find_siblings(model, TOKENS),
        {f"{LAYERS}.linear.Linear.__call__"},
    ),
    (
        "mlxflow.ops.attention_overrides",
        lambda model: attention_overrides.first_causal_heads(model, context_length=8, masks_documents=False),
        {ATTENTION},
    ),
    (
        "mlxflow.training.output_head",
        lambda model: find_head(model, 90),
        {"class of mlx_lm.models.llama.LlamaModel", f"class of {LAYERS}.linear.Linear"},
    ),
    (
        "mlxflow.quantization.block_slices",
        _learn,
        {"class of mlx_lm.models.llama.TransformerBlock"},
    ),
    (
        "mlxflow.quantization.scale_groups",
        _learn,
        {
            f"class of {LAYERS}.linear.Linear",
            f"class of {LAYERS}.normalization.RMSNorm",
            f"class of {LAYERS}.positional_encoding.RoPE",
            "class of mlx_lm.models.llama.Attention",
            "class of mlx_lm.models.llama.MLP",
        },
    ),
    (
        "mlxflow.quantization.block_calls",
        lambda model: record_blocks(model, context_length=8, name="quantize.method"),
        {"class of mlx_lm.models.llama.TransformerBlock"},
    ),
    (
        "mlxflow.quantization.layer_inputs",
        lambda model: input_products(
            model, ["model.layers.0.self_attn.q_proj"], lambda begin, end: model(TOKENS), [(0, 1)]
        ),
        {f"class of {LAYERS}.linear.Linear"},
    ),
    (
        "mlxflow.ops.graph_trace",
        lambda _: graph_trace.trace(lambda x: [x + 1], [mx.zeros(2)], prefix=""),
        {"mlx.core.vjp", "mlx.core.value_and_grad", "mlx.core.checkpoint"},
    ),
    (
        "mlxflow.ops.mlx_lm_import",
        lambda _: _import_utils(),
        {"sys.modules[mlx_lm.tokenizer_utils]", "sys.modules[huggingface_hub]", "resource.setrlimit"},
    ),
]

#: What replaces an attribute for the whole process.
PERMANENT = {
    "mlxflow.ops.dora_order",
    "mlxflow.ops.gather_matmul",
    "mlxflow.ops.mlx_lm_import",
    "mlxflow.ops.quantized_matmul",
    "mlxflow.ops.wide_scales",
}


_IMPORTS = ("mlx_lm.utils", "mlx_lm.tokenizer_utils", "huggingface_hub")


def _import_utils() -> None:
    """Import `mlx_lm.utils` a second time, as if neither it nor what it imports had been."""
    kept = {name: sys.modules.pop(name) for name in _IMPORTS if name in sys.modules}
    package, finders = sys.modules["mlx_lm"], list(sys.meta_path)
    attributes = dict(vars(package))
    try:
        sys.meta_path.insert(0, mlx_lm_import._KeepingLimits())
        mlx_lm_import.mlx_lm_utils()
    finally:
        sys.meta_path[:] = finders
        for name in _IMPORTS:
            sys.modules.pop(name, None)
        sys.modules.update(kept)
        vars(package).update(attributes)


def _state(model: nn.Module) -> list[Any]:
    """Return all that the blocks replace: operations, methods, the classes of layers and modules."""
    owners = [
        mx,
        mx.fast,
        mx.linalg,
        nn.Linear,
        nn.Embedding,
        base,
        base.BaseModelArgs,
        activations,
        llama,
        lora.LoRALinear,
        dwq,
        server,
    ]
    return [
        *(dict(vars(owner)) for owner in owners),
        {path: type(layer) for path, layer in model.named_modules()},
        importlib.import_module("resource").setrlimit,
        {name for name, module in sys.modules.items() if name in _IMPORTS and module.__spec__ is None},  # stand-ins
    ]


def _temporary() -> list[Replacement]:
    return [replacement for replacement in active() if not replacement.is_permanent]


@pytest.mark.parametrize(("by", "enter", "targets"), BLOCKS)
def test_a_context_lists_its_replacements_and_undoes_them(
    by: str, enter: Callable[[nn.Module], Block], targets: set[str]
) -> None:
    model = _model()
    block = enter(model)
    before = _state(model)
    with block:
        replaced = {replacement.target for replacement in _temporary() if replacement.by == by}
        assert targets <= replaced
        assert not {target for target in replaced - targets if not target.endswith(".swiglu")}
        assert _state(model) != before
    assert _state(model) == before
    assert not _temporary()


@pytest.mark.parametrize(("by", "enter", "targets"), BLOCKS)
def test_a_context_that_raises_undoes_its_replacements(
    by: str, enter: Callable[[nn.Module], Block], targets: set[str]
) -> None:
    model = _model()
    block = enter(model)
    before = _state(model)
    with pytest.raises(KeyboardInterrupt), block:
        raise KeyboardInterrupt
    assert _state(model) == before
    assert not _temporary()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Replacement]:
    """Return a list that grows by each replacement that is made."""
    replacements: list[Replacement] = []

    class Recorded(patching._Undoable):
        def __init__(self, slot: Any, value: Any, by: str, *, is_permanent: bool) -> None:
            super().__init__(slot, value, by, is_permanent=is_permanent)
            replacements.append(self.replacement)

    monkeypatch.setattr(patching, "_Undoable", Recorded)
    return replacements


@pytest.mark.parametrize(("by", "call", "targets"), CALLS)
def test_a_decorated_call_undoes_its_replacements(
    by: str, call: Callable[[nn.Module], Any], targets: set[str], made: list[Replacement]
) -> None:
    model = _model()
    before = _state(model)
    call(model)
    assert {replacement.target for replacement in made if replacement.by == by} == targets
    assert _state(model) == before
    assert not _temporary()


def test_nested_contexts_are_undone_in_reverse_order() -> None:
    model = _model()
    before = _state(model)
    blocks = [recomputed(model, every=1), _kernels(model), fake_quantized(model, _plan(model)), replaced_swiglu()]
    with ExitStack() as stack:
        for block in [*blocks, linear_gradients.replaced_products(), linear_gradients.ordered_lookups()]:
            stack.enter_context(block)
        within = _state(model)
        with pytest.raises(ZeroDivisionError), linear_gradients.replaced_products(), recomputed(model, every=1):
            raise ZeroDivisionError
        assert _state(model) == within
    assert _state(model) == before
    assert not _temporary()


def test_an_interrupt_between_two_replacements_undoes_the_first() -> None:
    owner = types.SimpleNamespace(__name__="owner", a=1)
    with pytest.raises(TypeError), patching.attributes((owner, "a", 2), (owner, 3, 4), by="test"):  # type: ignore[arg-type]
        pass
    assert vars(owner) == {"__name__": "owner", "a": 1}
    assert not _temporary()


@pytest.mark.parametrize("first", [0, 1])
def test_contexts_that_end_out_of_order_restore_the_original(first: int) -> None:
    owner = types.SimpleNamespace(__name__="owner", a=1)
    blocks = [patching.attributes((owner, "a", value), by="test") for value in (2, 3)]
    for block in blocks:
        block.__enter__()
    blocks[first].__exit__(None, None, None)
    assert owner.a == (3, 2)[first]
    blocks[1 - first].__exit__(None, None, None)
    assert owner.a == 1


def test_an_attribute_that_was_absent_is_absent_afterwards() -> None:
    class Inherits(nn.Linear):  # type: ignore[misc]
        pass

    with patching.attributes((Inherits, "__call__", len), by="test"):
        assert "__call__" in vars(Inherits)
    assert "__call__" not in vars(Inherits)


def test_a_class_that_was_restored_early_stays_restored() -> None:
    layer = nn.Linear(2, 2)
    with patching.layer_classes([(layer, type("Linear", (nn.Linear,), {}))], by="test"):
        patching.restore_class(layer)
        assert type(layer) is nn.Linear
        assert not _temporary()
    assert type(layer) is nn.Linear
    patching.restore_class(layer)  # nothing to restore


def test_a_method_is_replaced_for_one_layer() -> None:
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    with patching.layer_method(one, "__call__", lambda _: lambda self, x: "replaced", by="test"):
        assert one(mx.ones((1, 2))) == "replaced"
        assert other(mx.ones((1, 2))).shape == (1, 2)
    assert type(one) is nn.Linear


def test_a_permanent_replacement_is_made_once_and_can_be_removed() -> None:
    gather_matmul.uninstall()
    plain = mx.gather_mm
    replacement = Replacement("mlx.core.gather_mm", "mlxflow.ops.gather_matmul", True)
    assert replacement not in active()
    gather_matmul.install()
    gather_matmul.install()
    assert active().count(replacement) == 1
    assert mx.gather_mm is not plain
    gather_matmul.uninstall()
    assert mx.gather_mm is plain
    gather_matmul.install()


def _imported(nodes: list[ast.AST]) -> dict[str, str]:
    """Return the names that a module's imports bind, in functions too, and what each stands for."""
    names: dict[str, str] = {}
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.asname or alias.name.split(".")[0]: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _root(node: ast.expr) -> str | None:
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Call):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else None


def _assignments(nodes: list[ast.AST]) -> Iterator[tuple[ast.expr, ast.expr | None]]:
    """Yield the targets of all assignments and deletions, those within tuples singly, and the value."""
    for node in nodes:
        targets = (
            node.targets
            if isinstance(node, ast.Assign | ast.Delete)
            else [node.target]
            if isinstance(node, ast.AugAssign | ast.AnnAssign | ast.For)
            else []
        )
        for target in targets:
            for single in target.elts if isinstance(target, ast.Tuple | ast.List) else [target]:
                yield single, getattr(node, "iter", None) or getattr(node, "value", None)


def _foreign_names(nodes: list[ast.AST]) -> set[str]:
    """Return the names that stand for something of MLX or mlx-lm: imported, or assigned from such a name."""
    names = {name for name, full in _imported(nodes).items() if full.split(".")[0] in ("mlx", "mlx_lm")}
    for target, value in _assignments(nodes):
        is_attribute = isinstance(value, ast.Attribute) and _root(value) in names
        if isinstance(target, ast.Name) and is_attribute:
            names.add(target.id)
    return names


def replacements(text: str) -> list[str]:
    """Return the statements of a module that replace an attribute of MLX or mlx-lm, a class or an imported module."""
    nodes = list(ast.walk(ast.parse(text)))
    foreign = _foreign_names(nodes)
    functions = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    found = []
    for target, value in _assignments(nodes):
        if isinstance(target, ast.Subscript) and ast.unparse(target.value) == "sys.modules":
            found.append(ast.unparse(target))
        if not isinstance(target, ast.Attribute):
            continue
        is_method = isinstance(value, ast.Lambda) or (isinstance(value, ast.Name) and value.id in functions)
        if target.attr == "__class__" or _root(target) in foreign or (is_method and _root(target) != "self"):
            found.append(ast.unparse(target))
    for node in nodes:
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in ("setattr", "delattr", "sys.modules.update", "sys.modules.pop", "sys.modules.setdefault"):
                found.append(name)
    return found


#: Other statements: of doit, a new module, and the loader of one import. None replaces anything of MLX.
ALLOWED: Mapping[str, list[str]] = {
    "tasks/verbs.py": ["Help.print_usage"],  # doit has no other way to print a help of its own for `doit --help`
    "mlxflow/models/model_code.py": ["sys.modules[spec.name]"],
    "mlxflow/ops/mlx_lm_import.py": ["spec.loader.exec_module"],
    "mlxflow/ops/module_caches.py": ["delattr", "setattr"],  # gives a module back what it had
}


@functools.cache
def _sources() -> dict[str, str]:
    """Return the source of each file in which what replaces an attribute may stand."""
    files = [*(REPOSITORY / "mlxflow").rglob("*.py"), *(REPOSITORY / "tasks").rglob("*.py")]
    return {file.relative_to(REPOSITORY).as_posix(): file.read_text(encoding="utf-8") for file in files}


def test_no_other_module_replaces_anything() -> None:
    found = {name: replacements(text) for name, text in _sources().items()}
    assert {name for name, lines in found.items() if lines} == {"mlxflow/ops/patching.py", *ALLOWED}
    assert {name: found[name] for name in ALLOWED} == ALLOWED


def test_every_module_that_replaces_something_is_listed() -> None:
    users = set()
    for name, text in _sources().items():
        imported = _imported(list(ast.walk(ast.parse(text)))).values() if "patching" in text else ()
        if any(full.startswith("mlxflow.ops.patching") for full in imported):
            users.add(name.removesuffix(".py").replace("/", "."))
    assert users == {by for by, *_ in (*BLOCKS, *CALLS)} | PERMANENT


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import mlx.core as mx\nmx.fast.rope = 1\n", ["mx.fast.rope"]),
        ("import mlx.core as mx\nfast: Any = mx.fast\nfast.rope = 1\n", ["fast.rope"]),
        ("def f():\n    import mlx.nn as nn\n    nn.Linear.__call__, x = g, h\n", ["nn.Linear.__call__"]),
        ("from mlx_lm.models import base\ndel base.create\n", ["base.create"]),
        ("def f(): ...\nfor module in modules:\n    module.swiglu = f\n", ["module.swiglu"]),
        ("layer.__class__ = kind\n", ["layer.__class__"]),
        ("sys.modules['a'] = b\nsetattr(a, b, c)\n", ["sys.modules['a']", "setattr"]),
        ("import mlx.core as mx\nlayer.weight = mx.zeros(2)\nself.call = call\n", []),
    ],
)
def test_replacements_are_found_in_source(text: str, expected: list[str]) -> None:
    assert replacements(text) == expected
