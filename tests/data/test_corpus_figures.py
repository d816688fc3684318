from mlxflow.data.corpus_figures import DocumentLengths


def test_quantiles_without_documents_are_an_empty_table() -> None:
    import msgspec

    assert msgspec.to_builtins(DocumentLengths()) == {}
    assert msgspec.convert({}, DocumentLengths) == DocumentLengths()
