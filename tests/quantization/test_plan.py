import mlx.nn as nn
import pytest

from mlxflow.messages.errors import WorkflowError
from mlxflow.quantization.plan import Rule, check_supported, resolve
from mlxflow.quantization.settings import Setting
from tests.small_models import llama

DEFAULT = Setting("affine", 4, 64)


def _model(*, width: int = 96, tied: bool = True) -> nn.Module:
    model, _ = llama(vocab_size=60, hidden_size=128, num_layers=2, intermediate_size=width, tie_word_embeddings=tied)
    return model


def test_the_first_matching_rule_applies_and_the_default_otherwise() -> None:
    rules = [
        Rule("*.1.mlp.*", bits=3, group_size=32),
        Rule("*.mlp.down_proj", skip=True),
        Rule("*.mlp.*", bits=8),
        Rule("*embed*", mode="mxfp8"),
    ]
    plan = resolve(_model(), default=DEFAULT, rules=rules, key="quantize")
    assert plan.layers["model.layers.1.mlp.down_proj"] == Setting("affine", 3, 32)
    assert plan.layers["model.layers.0.mlp.up_proj"] == Setting("affine", 8, 64)
    assert plan.layers["model.embed_tokens"] == Setting("mxfp8", 8, 32)  # what the mode has, not the default's 64
    assert plan.layers["model.layers.0.self_attn.q_proj"] == DEFAULT
    assert plan.skipped == ["model.layers.0.mlp.down_proj"]


def test_the_config_lists_every_layer_that_differs_or_stays_dense() -> None:
    rules = [Rule("*.0.mlp.up_proj", mode="symmetric", bits=3), Rule("*.q_proj", skip=True)]
    plan = resolve(_model(), default=DEFAULT, rules=rules, key="quantize")
    assert plan.undivided == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    assert plan.config() == {
        "group_size": 64,
        "bits": 4,
        "mode": "affine",
        "model.layers.0.mlp.up_proj": {"group_size": 64, "bits": 3, "mode": "affine"},
        "model.layers.0.self_attn.q_proj": False,
        "model.layers.1.self_attn.q_proj": False,
    }


def test_layers_that_stay_dense_for_their_width_are_announced() -> None:
    plan = resolve(_model(), default=DEFAULT, rules=[Rule("*.q_proj", skip=True)], key="quantize")
    assert plan.warning("quantize:q4") == (
        "quantize:q4: 2 of 15 layers stay dense, their widths are no multiples of group_size 64: "
        "model.layers.0.mlp.down_proj, model.layers.1.mlp.down_proj"
    )
    assert resolve(_model(width=128), default=DEFAULT, rules=(), key="quantize").warning("quantize") is None


def test_the_architectures_own_predicate_applies_unless_a_rule_matches() -> None:
    class Model(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.router, self.up, self.norm = nn.Linear(64, 8), nn.Linear(64, 8), nn.Linear(64, 8)

        def quant_predicate(self, path: str, _: nn.Module) -> bool | dict[str, int]:
            return {"bits": 8, "group_size": 64} if path == "router" else path != "norm"

    plan = resolve(Model(), default=DEFAULT, rules=[Rule("norm", bits=6)], key="quantize")
    assert plan.layers == {"router": Setting("affine", 8, 64), "up": DEFAULT, "norm": Setting("affine", 6, 64)}
    assert resolve(Model(), default=DEFAULT, rules=(), key="quantize").skipped == ["norm"]


@pytest.mark.parametrize(
    ("rules", "lines"),
    [
        (
            [Rule("*.mlp.up_porj", bits=8), Rule("*embed*", bits=8), Rule("nothing", bits=8)],
            [
                'quantize.layers[0].match = "*.mlp.up_porj": matches no layer. '
                "Did you mean model.layers.1.mlp.up_proj?",
                'quantize.layers[2].match = "nothing": matches no layer. Layers are, for example, '
                "model.embed_tokens, model.layers.1.self_attn.q_proj, model.layers.1.self_attn.k_proj, "
                "model.layers.1.self_attn.v_proj, model.layers.1.self_attn.o_proj, model.layers.1.mlp.gate_proj, "
                "model.layers.1.mlp.down_proj, model.layers.1.mlp.up_proj.",
            ],
        ),
        (
            [Rule("lm_head", bits=8)],
            [
                'quantize.layers[0].match = "lm_head": matches no layer. The head of this model is its embedding. '
                "Match model.embed_tokens."
            ],
        ),
        (
            [Rule("*.0.mlp.down_proj", bits=8)],
            [
                'quantize.layers[0].match = "*.0.mlp.down_proj": group_size 64 does not divide the width 96 of '
                "model.layers.0.mlp.down_proj. Name group_size = 32, or set skip = true."
            ],
        ),
        (
            [Rule("*.0.mlp.down_proj", mode="affine", group_size=128), Rule("*.1.mlp.down_proj", mode="mxfp4")],
            [
                'quantize.layers[0].match = "*.0.mlp.down_proj": group_size 128 does not divide the width 96 of '
                "model.layers.0.mlp.down_proj. Name group_size = 32, or set skip = true."
            ],
        ),
        (
            [Rule("*.q_proj", mode="nvfp4", bits=8)],
            ['quantize.layers[0].bits = 8: mode "nvfp4" needs bits 4. Set bits = 4.'],
        ),
        (
            [Rule("*", skip=True)],
            ["quantize.layers: every layer stays dense, nothing would be quantized. Leave one to be quantized."],
        ),
    ],
)
def test_a_rule_that_contradicts_the_model_is_an_error(rules: list[Rule], lines: list[str]) -> None:
    with pytest.raises(WorkflowError) as caught:
        resolve(_model(), default=DEFAULT, rules=rules, key="quantize")
    assert list(caught.value.problems) == lines


def test_an_untied_head_can_be_matched_by_a_rule() -> None:
    plan = resolve(_model(tied=False), default=DEFAULT, rules=[Rule("lm_head", bits=8)], key="quantize")
    assert plan.layers["lm_head"].bits == 8


@pytest.mark.parametrize(
    ("width", "setting", "advice"),
    [
        (96, Setting("affine", 4, 64), "Set group_size = 32."),
        (48, Setting("affine", 4, 128), 'Set mode = "nvfp4" with group_size = 16.'),
        (48, Setting("mxfp4", 4, 32), 'Set mode = "nvfp4" with group_size = 16.'),
        (40, Setting("nvfp4", 4, 16), "Quantize a model with wider layers."),
    ],
)  # fmt: skip
def test_groups_that_divide_no_width_are_refused_with_a_size_that_does(
    width: int, setting: Setting, advice: str
) -> None:
    model = nn.Sequential(nn.Embedding(10, width), nn.Linear(width, 32, bias=False), nn.LayerNorm(32))
    with pytest.raises(WorkflowError) as caught:
        resolve(model, default=setting, rules=(), key="quantize:q4")
    assert str(caught.value) == (
        f'quantize:q4: groups of {setting.group_size} weights (mode "{setting.mode}") divide the width of no layer '
        f"({width}). {advice}"
    )


class _Mixture(nn.Module):  # type: ignore[misc]
    """Two layers and a router for which the architecture asks for 8 bits in groups of 64, as mlx-lm's mixtures do."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, 8, bias=False), nn.Linear(256, 8, bias=False)

    def quant_predicate(self, path: str, _: nn.Module) -> bool | dict[str, int]:
        return {"bits": 8, "group_size": 64} if path == "gate" else True


@pytest.mark.parametrize("width", [64, 96, 128, 256])
@pytest.mark.parametrize(
    "setting",
    [
        Setting("affine", 4, 32), Setting("affine", 3, 64), Setting("affine", 2, 128), Setting("mxfp4", 4, 32),
        Setting("mxfp8", 8, 32), Setting("nvfp4", 4, 16),
    ],
)  # fmt: skip
def test_a_plan_without_rules_matches_mlx_lms_converter(setting: Setting, width: int) -> None:
    from mlx_lm.utils import quantize_model

    plan = resolve(_Mixture(width), default=setting, rules=(), key="quantize")
    try:
        theirs, _ = quantize_model(_Mixture(width), {}, setting.group_size, setting.bits, mode=setting.mode)
    except ValueError:  # it tries groups of 64 on a router of another width
        assert (width % 64, width % setting.group_size) == (32, 0)
        assert plan.undivided == ["gate"]
        return
    packed = {
        path: Setting(layer.mode, layer.bits, layer.group_size)
        for path, layer in theirs.named_modules()
        if "scales" in layer
    }
    assert plan.layers == packed


def test_an_architecture_that_asks_for_bits_gets_the_fixed_zero_point_of_the_table() -> None:
    plan = resolve(_Mixture(128), default=Setting("symmetric", 4, 32), rules=(), key="quantize")
    assert plan.layers["gate"] == Setting("symmetric", 8, 64)


def test_modes_that_the_installed_mlx_lacks_are_refused() -> None:
    check_supported({"a": Setting("nvfp4", 4, 16), "b": Setting("symmetric", 5, 32)}, "quantize")
    with pytest.raises(WorkflowError) as caught:
        check_supported({"a": DEFAULT, "b": Setting("affine", 7, 64), "c": Setting("affine", 7, 64)}, "quantize")
    assert str(caught.value) == (
        'quantize: the installed MLX cannot quantize with mode "affine", bits 7 and group_size 64. '
        "Use another setting, or another version of mlx."
    )
