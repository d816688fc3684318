import itertools

import msgspec
import pytest

from mlxflow.workflow.stage_references import (
    CycleError,
    Known,
    ReferenceRecorder,
    ordered,
    tokenizer_origin,
    trained_length,
    upstream,
)


class Table(msgspec.Struct):
    tokenizer_source: str = ""


def known(**sources: str) -> Known:
    made = Known()
    for name, source in sources.items():
        made.add(name.replace("_", ":"), Table(source))
    return made


def test_tasks_keep_their_order_unless_one_reads_from_a_later_one() -> None:
    assert ordered({"a": [], "b": ["a"], "c": []}) == ["a", "b", "c"]
    assert ordered({"a": ["c"], "b": [], "c": ["b"], "d": []}) == ["b", "c", "a", "d"]


def test_every_order_of_the_same_tasks_puts_each_after_the_ones_it_reads_from() -> None:
    reads = {"a": ["b", "c"], "b": ["d"], "c": ["d"], "d": [], "e": ["a"]}
    for names in itertools.permutations(reads):
        order = ordered({name: reads[name] for name in names})
        assert sorted(order) == sorted(reads)
        assert all(order.index(one) < order.index(name) for name, read in reads.items() for one in read)


def test_a_chain_longer_than_the_recursion_limit_is_ordered() -> None:
    chain = {str(number): [str(number + 1)] for number in range(5000)} | {"5000": []}
    assert ordered(chain) == [str(number) for number in range(5000, -1, -1)]
    assert len(upstream(["0"], chain)) == 5001


def test_a_circle_is_an_error_with_its_tasks_alone() -> None:
    with pytest.raises(CycleError) as caught:
        ordered({"x": ["a"], "a": ["b"], "b": ["c", "y"], "c": ["a"], "y": []})
    assert caught.value.tasks == ["a", "b", "c", "a"]
    with pytest.raises(CycleError, match=r"^a -> a$"):
        ordered({"a": ["a"]})


def test_upstream_is_everything_read_directly_or_through_others() -> None:
    reads = {"a": ["b"], "b": ["c"], "c": [], "d": ["c"]}
    assert upstream(["a"], reads) == {"a", "b", "c"}
    assert upstream([], reads) == set()


def test_a_stage_name_is_its_only_variant_and_the_first_of_several() -> None:
    one, two = known(train_a=""), known(train_a="", train_b="")
    assert (one.resolved("train"), one.first("train")) == ("train:a", "train")
    assert (two.resolved("train"), two.first("train")) == ("train", "train:a")
    assert two.matching("train") == ["train:a", "train:b"]
    assert two.table("train") is None


def test_the_tokenizer_of_a_chain_is_that_of_its_first_model() -> None:
    chain = known(quantize_q4="train:chat", train_chat="pretokenize:chat", pretokenize_chat="pretokenize:base")
    chain.add("pretokenize:base", Table())
    assert tokenizer_origin("quantize:q4", chain) == "pretokenize:base"
    chain.add("pretokenize:base", Table("folder"))
    assert tokenizer_origin("quantize", chain) == "folder"
    assert tokenizer_origin("owner/name", chain) == "owner/name"
    chain.add("pretokenize:base", Table("quantize:q4"))  # a circle ends
    assert tokenizer_origin("quantize:q4", chain) == "quantize:q4"


def test_a_recorder_keeps_the_first_key_of_each_stage_and_ignores_wildcards() -> None:
    recorder = ReferenceRecorder(known(train_a="", quantize=""))
    assert recorder.expand(("train", "quantize:*"), "models") == ("train",)
    recorder.folder("train", "input")
    recorder.folder("train:a", "models")
    recorder.folder("tarin", "input")
    assert recorder.stage_of("quantize", "model")
    assert recorder.stage_of("./quantize", "model") is None
    assert recorder.keys == {"train:a": ("input", "train"), "quantize": ("model", "quantize")}


def test_the_rows_of_a_model_are_those_of_the_training_that_made_it() -> None:
    class Base(msgspec.Struct, frozen=True):
        from_: str = ""

    class Tokens(msgspec.Struct):
        context_length: int = 32

    class Training(msgspec.Struct):
        input: str = "pretokenize"
        model: Base = Base()

    class Quantizing(msgspec.Struct):
        input: str = "train:base"
        model: str = ""

    chain = Known()
    chain.add("pretokenize", Tokens())
    chain.add("train:base", Training())
    chain.add("train:chat", Training(model=Base("quantize")))
    chain.add("quantize", Quantizing())
    assert trained_length("train:chat", chain) == ("", 32)
    chain.add("train:base", Training(model=Base("folder")))
    assert trained_length("train:chat", chain) == ("folder", None)
    assert trained_length("owner/name", chain) == ("owner/name", None)
    assert trained_length("train:none", chain) == ("", None)
