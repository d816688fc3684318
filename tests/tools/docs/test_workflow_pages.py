from tools.docs.workflow_pages import workflow_pages


def test_a_page_has_each_key_of_its_table_and_a_section_for_each_table_inside() -> None:
    pages = workflow_pages()
    assert list(pages) == [
        "workflow",
        "tracking",
        "store",
        "pretokenize",
        "train",
        "quantize",
        "export",
        "evaluate",
        "profile",
        "benchmark",
        "report",
    ]
    assert "| `train.model.num_layers` | `2` | a whole number from 1 to 1000 | transformer blocks |" in pages["train"]
    assert "## `train.model`" in pages["train"]
    assert "## `pretokenize.sources[]`" in pages["pretokenize"]
    assert "| `quantize.layers[].match` | required |" in pages["quantize"]
