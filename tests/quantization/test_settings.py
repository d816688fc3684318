import pytest

from mlxflow.quantization.settings import RequestedSetting, Setting, completed, mistakes_in


def test_symmetric_codes_are_stored_as_affine() -> None:
    assert Setting("symmetric", 4, 64).stored() == {"group_size": 64, "bits": 4, "mode": "affine"}
    assert Setting("mxfp4", 4, 32).stored()["mode"] == "mxfp4"


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (Setting("affine", 4, 64), []),
        (Setting("affine", 7, 64), ['mode "affine" needs one of 2, 3, 4, 5, 6, 8']),
        (Setting("mxfp4", 8, 64), ['mode "mxfp4" needs bits 4', 'mode "mxfp4" needs group_size 32']),
    ],
)
def test_errors_name_the_values_that_the_mode_supports(setting: Setting, expected: list[str]) -> None:
    assert [mistake.expected for mistake in mistakes_in(setting)] == expected


def test_completed_keeps_the_default_s_values_where_the_mode_has_them() -> None:
    default = Setting("affine", 8, 32)
    assert completed(default, mode=None, bits=None, group_size=None) == default
    assert completed(default, mode="symmetric", bits=None, group_size=64) == Setting("symmetric", 8, 64)
    assert completed(default, mode="nvfp4", bits=None, group_size=None) == Setting("nvfp4", 4, 16)


def test_a_request_takes_the_mode_s_defaults() -> None:
    assert RequestedSetting("affine").setting == Setting("affine", 4, 64)
    assert RequestedSetting("mxfp8", group_size=32).setting == Setting("mxfp8", 8, 32)


def test_a_rule_of_another_mode_leaves_bits_open_only_if_both_modes_have_the_same() -> None:
    table = RequestedSetting("affine", bits=8)
    assert table.by_rule("symmetric", None, None) == {"bits": None, "group_size": None}
    assert table.by_rule("mxfp8", None, None) == {"bits": 8, "group_size": 32}
    assert table.by_rule("mxfp4", None, None) == {"bits": 4, "group_size": 32}
