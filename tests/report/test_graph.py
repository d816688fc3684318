from mlxflow.report import graph


def test_the_graph_leaves_out_edges_implied_by_others() -> None:
    boxes = [
        graph.Box("a", (), "fresh", ()),
        graph.Box("b", ("a",), "fresh", ()),
        graph.Box("c", ("a", "b"), "missing", ()),
    ]
    drawn = graph.draw(boxes, "the graph")
    assert drawn.count('class="edge"') == 2 * 2  # for a wide page and for a phone
    assert drawn.count('class="box fresh"') == 2 * 2
    assert drawn.count('class="box missing"') == 2
