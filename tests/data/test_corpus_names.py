from mlxflow.data.corpus_names import CorpusNames


def test_a_setting_is_named_by_its_table_if_it_has_one() -> None:
    assert CorpusNames("pretokenize:small").of("sources") == "pretokenize:small.sources"
    assert CorpusNames().of("sources") == "sources"
