from mlxflow.quantization.layer_rules import LayerRule
from mlxflow.quantization.plan import Rule
from mlxflow.quantization.settings import RequestedSetting

TABLE = RequestedSetting("affine", 4, 64)


def test_keys_that_a_rule_leaves_out_follow_the_plan() -> None:
    assert LayerRule(match="*.mlp.*").rule == Rule("*.mlp.*", skip=False, mode=None, bits=None, group_size=None)
    assert LayerRule(match="a", bits=8, group_size=32).rule == Rule("a", bits=8, group_size=32)
    assert LayerRule(match="a", skip=True).rule == Rule("a", skip=True)


def test_a_rule_of_another_mode_gets_the_bits_and_group_size_of_its_mode() -> None:
    assert LayerRule(match="a", mode="mxfp8").completed(TABLE).rule == Rule("a", mode="mxfp8", bits=8, group_size=32)


def test_a_rule_of_a_mode_with_the_same_choices_follows_the_table() -> None:
    rule = LayerRule(match="a", mode="symmetric")
    assert rule.completed(TABLE) == rule
    assert LayerRule(match="a").completed(TABLE) == LayerRule(match="a")
