from pathlib import Path

from tests.report.pages import text_of
from tests.report.runs import edit


def test_sizes_are_compared_with_fp32_and_with_the_dense_model(root: Path) -> None:
    edit(root, "quantize:q4", lambda report: report.update(dense_bits_per_weight=16.0))
    text = text_of(root)
    assert (
        "7.10 times smaller than in fp32, 3.56 times smaller than the dense model of 16 bits a weight: 49.1 kB" in text
    )
    assert "Times smaller than fp32 Than the dense model" in text
    assert "Times smaller than fp32 Than the dense model" in text
