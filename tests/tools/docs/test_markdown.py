from tools.docs import markdown


def test_a_table_escapes_bars_and_line_breaks() -> None:
    assert markdown.table(("a", "b"), [("x | y", "one\ntwo")]) == "| a | b |\n|---|---|\n| x \\| y | one two |"


def test_a_page_says_that_it_is_generated() -> None:
    assert markdown.page("Title", "text\n", "") == f"# Title\n{markdown.NOTICE}\n\ntext\n"
