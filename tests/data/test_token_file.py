from pathlib import Path

from tests.data.test_token_file_writer import Corpus


def test_a_row_names_the_file_and_place_of_its_documents(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path, 7, longest=25)
    opened, _ = corpus.write(tmp_path / "rows.safetensors")
    places = [(number, i + 1) for number, shard in enumerate(corpus.shards) for i in range(shard.num_documents)]
    assert [opened.place(document) for document in range(len(corpus.documents))] == places
