from pathlib import Path

import tomli_w

from mlxflow.report.load_run import read_run
from mlxflow.report.render import render
from mlxflow.report.sections.quality_curve import ModelPoint, pareto_front
from mlxflow.storage.report_files import read_report
from mlxflow.storage.run_context import Member
from tests.report.pages import Seen, text_of
from tests.report.runs import edit, members

#: Stored bits, divergence and its standard error of further variants.
VARIANTS = {
    "q2": (2.6, 1.9, 0.05),
    "b2": (2.6, 0.62, 0.03),
    "q3": (3.5, 0.41, 0.02),
    "b3": (3.5, 0.16, 0.012),
    "budget": (3.2, 0.24, 0.015),
    "b2e": (2.6, 0.44, 0.02),
    "q4g128": (4.25, 0.19, 0.011),
}


def write_variants(root: Path) -> list[Member]:
    """Write further quantize variants beside those of a hand-made run; return all of its stages."""
    found = members()
    for name, (bits, kl, error) in VARIANTS.items():
        report = read_report(root / "artifacts/quantize/q4/report.toml")
        report["bits_per_weight"] = bits
        report["quality"] |= {"kl": kl, "kl_standard_error": error}
        folder = Path("artifacts/quantize", name)
        (root / folder).mkdir(parents=True)
        (root / folder / "report.toml").write_text(tomli_w.dumps(report))
        found.append(Member(f"quantize:{name}", folder, ("train",), (folder / "report.toml",)))
    return found


def test_the_front_has_the_models_that_no_other_one_beats() -> None:
    points = [
        ModelPoint("a", 2.5, 1.0, 0.1),
        ModelPoint("b", 2.5, 2.0, 0.1),
        ModelPoint("c", 3.0, 1.5, 0.1),
        ModelPoint("d", 3.5, 0.5, 0.1),
        ModelPoint("e", 4.0, 0.5, 0.1),
    ]
    assert [one.task for one in pareto_front(points)] == ["a", "d"]
    assert pareto_front([]) == []


def test_all_variants_are_drawn_with_their_intervals_and_the_front_is_named(root: Path) -> None:
    edit(root, "quantize:q4", lambda report: report["quality"].update(kl=0.05, kl_standard_error=0.004))
    edit(root, "quantize:q8", lambda report: report["quality"].update(kl=0.01, kl_standard_error=0.001))
    seen = Seen(render([read_run(root, write_variants(root), name="by hand")]))
    assert "Quality against size: divergence from the dense model, with its 95 % interval" in seen.text
    labels = [value for name, value in seen.attributes if name == "aria-label" and value and "Pareto" in value]
    (label,) = labels
    assert "quantize:b2e, quantize:budget, quantize:b3, " in label
    for task in ("q2", "b2", "q3", "q4g128"):
        assert f"quantize:{task}," not in label.partition("front:")[2]
    assert "quantize:b3 3.50 0.160 ± 0.012 yes" in seen.text
    paths = [value for name, value in seen.attributes if name == "d" and value and value.count("h10") == 2]
    assert len(paths) == len(VARIANTS) + 2


def test_a_single_model_has_no_curve(root: Path) -> None:
    edit(root, "quantize:q8", lambda report: report.pop("quality"))
    assert "Quality against size" not in text_of(root)
