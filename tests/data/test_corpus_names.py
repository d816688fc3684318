from mlxflow.data.corpus_names import CorpusNames


def test_a_setting_is_named_by_its_table_where_there_is_one() -> None:
    assert CorpusNames("pretokenize:small").of("sources") == "pretokenize:small.sources"
    assert CorpusNames().of("sources") == "sources"
