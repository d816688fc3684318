from pathlib import PurePath

import pytest

from mlxflow.data import records, splits
from mlxflow.data.splits import is_divided, side_of, sides_of

NAMES = {
    "test": "test TEST Test test_sft test_gen test-00000-of-00001 tests testset testSet TestSplit test2 squad.test.v2",
    "validation": "validation validation_matched val Val valid dev DEV dev2 eval evaluation heldout held_out held-out "
    "holdout hold_out squad_dev wikitext-103-valid valset devset train_eval",
    "train": "train train_sft training Train-00000-of-00002 trainset wikitext-103-train train2",
    "": "data all default latest contest value developer invalid evaluate attest devices strain unsupervised 0 held",
}


@pytest.mark.parametrize("side", NAMES)
def test_a_file_name_gives_its_split_in_any_spelling(side: str) -> None:
    assert {name: side_of(name) for name in NAMES[side].split()} == dict.fromkeys(NAMES[side].split(), side)


def test_names_of_several_splits_are_never_trained_on() -> None:
    assert [side_of(name) for name in ("train_test", "test_train", "valid_test", "dev_train")] == [
        "test",
        "test",
        "test",
        "validation",
    ]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst", ".GZ"])
def test_record_files_get_their_split_from_name_and_folder(suffix: str) -> None:
    named = {
        "train.jsonl": "train",
        "dev.JSONL": "validation",
        "data/test-00000-of-00001.parquet": "test",
        "data/validation_matched-00000-of-00003.parquet": "validation",
        "a/test/0001.json": "test",
        "a/held-out/deep/0001.csv": "validation",
        "test-time-compute/part.jsonl": "",
        "part.jsonl": "",
        "train/dev.jsonl": "validation",
    }
    assert dict(zip(named, sides_of([PurePath(name + suffix) for name in named]), strict=True)) == named


def test_text_files_get_a_split_only_beside_a_training_split() -> None:
    alone = ["test.txt", "notes/dev.txt", "src/validation.py", "tests/eval.md", "test/a.txt"]
    assert sides_of([PurePath(name) for name in alone]) == [""] * 5
    beside = {
        "wiki.train.tokens": "train",
        "wiki.valid.tokens": "validation",
        "wiki.test.tokens": "test",
        "other.test.tokens": "",
        "b/train.py": "",
        "b/test.py": "",
        "c/train/pos/1.txt": "train",
        "c/test/neg/2.txt": "test",
        "d/test/neg/2.txt": "",
    }
    assert dict(zip(beside, sides_of([PurePath(name) for name in beside]), strict=True)) == beside


def test_a_data_set_with_splits_is_recognized_by_its_record_files() -> None:
    def divided(*names: str) -> bool:
        return is_divided(names)

    assert divided("README.md", "data/train-0.parquet", "data/test-0.parquet")
    assert divided("train.jsonl", "val.jsonl")
    assert not divided("train.jsonl", "other.jsonl")
    assert not divided("test.jsonl", "dev.jsonl")
    assert not divided("train.txt", "test.txt", "train.py", "test.py")


def test_the_suffixes_of_records_are_those_that_are_read_as_records() -> None:
    assert set(splits.RECORD_SUFFIXES) == set(records._KINDS)
