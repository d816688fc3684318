import mlx.nn as nn
import pytest

from mlxflow.errors import WorkflowError
from mlxflow.quantization.plan import Rule, check_supported, resolve
from mlxflow.quantization.settings import Setting
from tests.small_models import llama

DEFAULT = Setting("affine", 4, 64)


def _model(*, width: int = 96, tied: bool = True) -> nn.Module:
    model, _ = llama(vocab_size=60, hidden_size=128, num_layers=2, intermediate_size=width, tie_word_embeddings=tied)
    return model


def test_the_first_rule_that_matches_holds_and_the_rest_is_the_default() -> None:
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


def test_readers_are_told_every_layer_that_differs_and_every_one_left_dense() -> None:
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


def test_what_the_architecture_says_of_itself_holds_unless_a_rule_says_otherwise() -> None:
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
                "model.layers.0.mlp.down_proj. Name another group_size, or set skip = true."
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
def test_a_rule_that_does_not_fit_the_model_is_told(rules: list[Rule], lines: list[str]) -> None:
    with pytest.raises(WorkflowError) as caught:
        resolve(_model(), default=DEFAULT, rules=rules, key="quantize")
    assert list(caught.value.problems) == lines


def test_a_head_of_its_own_may_be_matched() -> None:
    plan = resolve(_model(tied=False), default=DEFAULT, rules=[Rule("lm_head", bits=8)], key="quantize")
    assert plan.layers["lm_head"].bits == 8


def test_a_group_size_that_divides_nothing_is_told() -> None:
    model = nn.Sequential(nn.Embedding(10, 48), nn.Linear(48, 32, bias=False), nn.LayerNorm(32))
    with pytest.raises(WorkflowError) as caught:
        resolve(model, default=Setting("affine", 4, 128), rules=(), key="quantize:q4")
    assert str(caught.value) == (
        "quantize:q4.group_size = 128: divides the width of no layer. Use a smaller one or wider layers."
    )


def test_what_the_installed_mlx_lacks_is_asked_of_it() -> None:
    check_supported({"a": Setting("nvfp4", 4, 16), "b": Setting("symmetric", 5, 32)}, "quantize")
    with pytest.raises(WorkflowError) as caught:
        check_supported({"a": DEFAULT, "b": Setting("affine", 7, 64), "c": Setting("affine", 7, 64)}, "quantize")
    assert str(caught.value) == (
        'quantize: the installed MLX cannot quantize with mode "affine", bits 7 and group_size 64. '
        "Use another setting, or another version of mlx."
    )
