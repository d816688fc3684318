import re

import pytest

from mlxflow.data.split_slices import parse_slices

GOOD = [
    "train",
    "test_sft",
    "train[:1%]",
    "train[10:20]",
    "train[-5:]",
    "train[:-5]",
    "train[25%:75%]",
    "train[-10%:]",
    "train[:10%]+test[50%:]",
    "train[3:]+train[:3]",
    "train[1:-1]",
    "train[:]",
]


@pytest.mark.parametrize("text", GOOD)
@pytest.mark.parametrize("num_rows", [100, 101, 1003])
def test_slices_match_those_of_datasets(text: str, num_rows: int) -> None:
    datasets = pytest.importorskip("datasets")
    lengths = dict.fromkeys(("train", "test", "test_sft"), num_rows)
    expected = [
        (one.splitname, one.from_, one.to) for one in datasets.ReadInstruction.from_spec(text).to_absolute(lengths)
    ]
    assert [(one.split, *one.bounds(num_rows)) for one in parse_slices(text)] == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", 'expected splits such as "train", "train[:1%]" or "train[10:20]+validation"'),
        ("train[:1%", 'expected splits such as "train", "train[:1%]" or "train[10:20]+validation"'),
        ("train[5]", 'expected splits such as "train", "train[:1%]" or "train[10:20]+validation"'),
        ("train[a:b]", 'expected splits such as "train", "train[:1%]" or "train[10:20]+validation"'),
        ("train+", 'expected splits such as "train", "train[:1%]" or "train[10:20]+validation"'),
        ("train[:0.5%]", 'expected splits such as "train", "train[:1%]" or "train[10:20]+validation"'),
        ("train[10:50%]", "train[10:50%] mixes rows and percentages"),
        ("train[:101%]", "train[:101%] goes beyond 100%"),
        ("train[:1000000000000000000000]", "train[:1000000000000000000000] goes beyond any split"),
        ("train[20:10]", "train[20:10] is empty"),
        ("train[:0]", "train[:0] is empty"),
        ("train[100%:]", "train[100%:] is empty"),
        ("test+train[-3:-5]", "train[-3:-5] is empty"),
    ],
)
def test_a_slice_that_is_always_empty_is_an_error(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        parse_slices(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train[:1%]", "no row is left of the 40 of train"),
        ("train[:41]", "train has 40 rows"),
        ("train[-41:]", "train has 40 rows"),
        ("train[30:-20]", "no row is left of the 40 of train"),
    ],
)
def test_a_slice_without_rows_in_a_split_is_an_error(text: str, said: str) -> None:
    (one,) = parse_slices(text)
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        one.bounds(40)
