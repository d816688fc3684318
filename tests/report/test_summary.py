import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from mlxflow.report.load_run import read_run
from mlxflow.report.render import render
from mlxflow.storage.run_context import Member
from tests.report.pages import Seen, text_of
from tests.report.runs import edit, read, write_run


def test_the_summary_comes_first_with_a_line_for_each_question(root: Path) -> None:
    text = text_of(root)
    answers = text[: text.index("What reads from what")]
    for line in (
        "6 of 6 stages built; together they took 75 s.",
        "7.90 M tokens of 713 documents to learn from, 236,147 held out. 1 record could not be read.",
        "38.5 perplexity on held-out text after 240 steps, from 2,079 before",
        "6,757 tokens learned from a second while training; 0.2 % of the time it waited for data.",
        "7.10 times smaller than in fp32: 49.1 kB, 4.50 bits a weight; perplexity 39.11 ± 0.50, dense 38.5.",
        "9 MB in MLX's arrays at the peak of a training step, the largest part of it weights (4 MB, 44%); no leak.",
        "2 times the speed of the plain baseline (1.86 to 2.16).",
    ):
        assert line in answers


def test_a_part_is_called_most_of_a_peak_from_half_of_it_on(root: Path) -> None:
    edit(root, "profile", lambda report: report["composition"].update(weights_bytes=0, update_bytes=6 * 10**6))
    assert "at the peak of a training step, most of it update (6 MB, 55%); no leak." in text_of(root)


def test_a_quantized_model_that_diverges_is_called_another_model(root: Path) -> None:
    quality = {"perplexity": 16.6, "dense_perplexity": 17.9, "kl": 0.42, "top1_agreement": 0.71}
    edit(root, "quantize:q4", lambda report: report["quality"].update(quality))
    said = (
        "dense 17.9; but its predictions diverge from the dense model's by 0.420 nats a token and share 71.0 % of "
        "first choices: not the dense model made smaller, another one that fits this text."
    )
    text = text_of(root)
    assert said in text
    assert text.count("not the dense model made smaller") == 1, "rounding alone is not"
    quality = {"perplexity": 17.9 * 1.4, "dense_perplexity": 17.9, "kl": 0.42}
    edit(root, "quantize:q4", lambda report: report["quality"].update(quality))
    assert "not the dense model made smaller" not in text_of(root), "the perplexity shows as much"


def test_each_variant_of_train_has_its_own_summary(root: Path) -> None:
    for name, perplexity in (("full", 12.5), ("lora", 14.5)):
        shutil.copytree(root / "artifacts/train", root / "artifacts" / f"train-{name}")
        path = root / "artifacts" / f"train-{name}/report.toml"
        report = tomllib.loads(path.read_text())
        path.write_text(tomli_w.dumps(report | {"last_validation_perplexity": perplexity}))
    found = [
        Member(
            f"train:{name}", Path("artifacts", f"train-{name}"), (), (Path("artifacts", f"train-{name}/report.toml"),)
        )
        for name in ("full", "lora")
    ]
    text = Seen(render([read_run(root, found, name="two")])).text
    assert "Did full learn? 12.5 perplexity on held-out text after 240 steps" in text
    assert "Did lora learn? 14.5 perplexity on held-out text after 240 steps" in text
    assert "How fast was full? 6,757" in text
    assert "How fast was lora? 6,757" in text


@pytest.mark.parametrize(
    ("task", "key", "question"),
    [
        ("pretokenize", "train", "What is {} made of? {}"),
        ("profile", "peak_memory_bytes", "Where does memory go in {}? {}"),
        ("benchmark", "promises", "Is it worth it in {}? {}"),
    ],
)
def test_each_variant_of_a_stage_has_its_own_line(root: Path, task: str, key: str, question: str) -> None:
    speed = {"promise": "fast", "holds": True}
    values: dict[str, list[tuple[Any, str]]] = {
        "train": [({"tokens": 1234}, "1,234"), ({"tokens": 5678}, "5,678")],
        "peak_memory_bytes": [(2_340_000, "2.34 MB"), (3_450_000, "3.45 MB")],
        "promises": [
            ({"training_speed": speed | {"measured": ratio, "low": ratio - 0.1, "high": ratio + 0.1}}, shown)
            for ratio, shown in ((1.5, "1.50"), (2.5, "2.50"))
        ],
    }
    members = []
    for name, (value, _) in zip(("one", "two"), values[key], strict=True):
        folder = Path("artifacts", f"{task}-{name}")
        shutil.copytree(root / "artifacts" / task, root / folder)
        path = root / folder / "report.toml"
        table = tomllib.loads(path.read_text())
        path.write_text(tomli_w.dumps(table | {key: table[key] | value if isinstance(value, dict) else value}))
        members.append(Member(f"{task}:{name}", folder, (), (folder / "report.toml",)))
    text = Seen(render([read_run(root, members, name="two")])).text
    for name, (_, shown) in zip(("one", "two"), values[key], strict=True):
        assert question.format(name, shown) in text


def test_a_gain_within_the_noise_is_called_noise(root: Path) -> None:
    edit(
        root,
        "benchmark",
        lambda report: report["training"][1].update(tokens_per_second=4100, low_tokens_per_second=3900),
    )
    assert "That is inside the noise." in text_of(root)


def test_the_summary_shows_the_speed_of_all_rounds_together(root: Path) -> None:
    told = {"promise": "fast", "measured": 1.9, "low": 1.8, "high": 2.0, "holds": True, "figure": "1.90 times"}
    edit(root, "benchmark", lambda report: report["promises"].update(training_speed=told))
    assert "1.90 times the speed of the plain baseline (1.80 to 2)." in text_of(root)
    assert "fast 1.90 times yes" in text_of(root)


def test_the_summary_names_the_gain_lost_in_the_artifact(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("lossy")
    write_run(folder)
    edit(folder, "train", lambda report: report.update(trained_validation_perplexity=30.0, gain_kept=0.293))
    edit(folder, "train", lambda report: report.update(fuse="never"))
    text = Seen(render([read(folder)])).text
    assert "beside the base model: a tool that does not apply them opens the base model." in text
    assert "from 2,079 before. The trained model had 30: its files keep 29.3 % of the gain." in text


def _model(name: str, speed: float | None) -> dict[str, Any]:
    if speed is None:
        return {"model": name, "error": "out of memory"}
    ends = {"low_decode_tokens_per_second": 0.9 * speed, "high_decode_tokens_per_second": 1.1 * speed}
    return {"model": name, "model_bytes": 10, "decode_tokens_per_second": speed, "prefill": []} | ends


@pytest.mark.parametrize(
    ("speed", "said"),
    [
        (900.0, "900 tokens a second in writing, 3 times those of train (300): faster."),
        (100.0, "100 tokens a second in writing, 0.333 times those of train (300): slower."),
        (310.0, "310 tokens a second in writing, 1.03 times those of train (300): the same within the noise."),
        (None, "\N{EM DASH} was not measured: out of memory."),
    ],
)
def test_the_speed_of_a_quantized_model_is_an_answer_whether_better_or_worse(
    root: Path, speed: float | None, said: str
) -> None:
    models = [_model("train", 300.0), _model("quantize:q4", speed)]
    edit(root, "benchmark", lambda report: report.update(models=models))
    text = text_of(root)
    assert f"How fast is q4? {said}" in text
    assert "How fast is q8?" not in text  # the benchmark did not measure it


def test_warnings_of_stages_stand_above_the_answers(root: Path) -> None:
    edit(root, "pretokenize", lambda report: report.update(warnings=["3 files are <b>empty</b>"]))
    edit(root, "train", lambda report: report.update(warning="worse", warnings=["worse", "12 epochs"]))
    text = text_of(root)
    assert text.index("train: worse") < text.index("train: 12 epochs") < text.index("Is it done?")
    assert text.index("pretokenize: 3 files are <b>empty</b>") < text.index("Is it done?")
