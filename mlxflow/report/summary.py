"""The summary at the top of the page: common questions, each answered by a figure and a sentence."""

import math
from collections.abc import Iterator

from mlxflow.report.elements import Answer
from mlxflow.report.formatting import (
    UNKNOWN,
    clean,
    plural,
    show,
    show_bytes,
    show_interval,
    show_large,
    show_percent,
    show_seconds,
)
from mlxflow.report.load_run import LoadedStage, Run, column
from mlxflow.report.sections.memory import ARRAYS
from mlxflow.report.sections.stages import WORDS
from mlxflow.report.stage_reports.benchmark import BenchmarkReport
from mlxflow.report.stage_reports.benchmark_rows import ModelRow
from mlxflow.report.stage_reports.evaluate import EvaluateReport
from mlxflow.report.stage_reports.pretokenize import PretokenizeReport
from mlxflow.report.stage_reports.profile import PeakParts, ProfileReport
from mlxflow.report.stage_reports.quantize import QualityFigures, QuantizeReport
from mlxflow.report.stage_reports.train import TrainReport
from mlxflow.storage.report_structs import F

# The most tasks of an evaluation that the summary names
_SUMMED_TASKS = 4

_PEAKS = ("peak_memory_bytes", "sample_peak_memory_bytes")


def answers(run: Run) -> list[Answer]:
    """Return the answers from the reports; unknown ones say so."""
    lines = [_state(run)]
    for answer in (_progress, _data, _quality, _accuracy, _speed, _size, _decode, _memory, _gain):
        lines += answer(run)
    return lines


def _state(run: Run) -> Answer:
    fresh = sum(one.state == "fresh" for one in run.stages)
    took = show_seconds(sum(one.report.run.seconds for one in run.stages if one.report))
    rest = [f"{stage.task} is {WORDS[stage.state]}" for stage in run.stages if stage.state != "fresh"]
    text = f"stages built; together they took {took}."
    return Answer(
        "Is it done?", f"{fresh} of {len(run.stages)}", text + (f" {'; '.join(rest)}." if rest else ""), "stages"
    )


def _progress(run: Run) -> Iterator[Answer]:
    """Yield how far each stage that trains now has come."""
    for one in run.stages:
        if one.state != "running":
            continue
        records = run.curves[one.task].records if one.task in run.curves else []
        steps, losses = column([each for each in records if each.get("kind") == "train"], "step", "loss")
        if not steps:
            continue
        said = f"nats a token while training, at step {show(steps[-1])}"
        _, held_out = column([each for each in records if each.get("kind") == "validation"], "step", "loss")
        if held_out:
            latest = f"{show(held_out[-1], 4)}, from " if len(held_out) > 1 else ""
            said += f"; on held-out text {latest}{show(held_out[0], 4)} before"
        yield Answer(f"How is {_name(one)} doing?", show(losses[-1], 4), f"{said}.", "learning")


def _data(run: Run) -> Iterator[Answer]:
    reported = _of_each(run, PretokenizeReport, "What was it made of?", "What is {name} made of?")
    if not reported:
        yield Answer("What was it made of?", UNKNOWN, "No corpus was reported.", "data")
    for _, report, question in reported:
        yield Answer(question, show_large(report.train.tokens), _corpus(report), "data")


def _corpus(report: PretokenizeReport) -> str:
    """Return the figures of a corpus, in sentences."""
    text = f"tokens of {plural(report.train.documents, 'document')} to learn from, "
    text += f"{show_large(report.validation.tokens)} held out."
    bad = sum(source.bad_records for source in report.sources)
    dropped = sum(side.dropped + side.truncated for side in (report.train, report.validation))
    text += f" {plural(bad, 'record')} could not be read." if bad else ""
    return text + (f" {plural(dropped, 'document')} dropped or cut short." if dropped else "")


def _of_each(run: Run, form: type[F], one: str, several: str) -> list[tuple[LoadedStage, F, str]]:
    """Return the variants of a stage with reports, each with its figures and its question.

    Args:
        run: the run.
        form: of the stage's figures.
        one: the question for a stage without variants.
        several: the question, with `{name}`, for one with variants.
    """
    reported = [(stage, figures) for stage in run.stages if (figures := stage.figures(form)) is not None]
    if not reported:
        return []
    has_variants = len(run.of_kind(reported[0][0].kind)) > 1
    return [(stage, figures, several.format(name=_name(stage)) if has_variants else one) for stage, figures in reported]


def _name(stage: LoadedStage) -> str:
    """Return the name of the variant, else of the stage."""
    return clean(stage.task.partition(":")[2] or stage.task)


def _quality(run: Run) -> Iterator[Answer]:
    reported = _of_each(run, TrainReport, "Did it learn?", "Did {name} learn?")
    if not reported:
        yield Answer("Did it learn?", UNKNOWN, "No training was reported.", "learning")
    for _, report, question in reported:
        yield Answer(question, show(report.last_validation_perplexity), _learned(report), "learning")


def _learned(report: TrainReport) -> str:
    """Return the result of a training, in sentences."""
    text = f"perplexity on held-out text after {plural(report.steps, 'step')}"
    if report.epochs is not None:
        text += f" ({report.epochs:.2g} epochs)"
    text += f", from {show(report.first_validation_perplexity)} before."
    gain_kept, best = report.gain_kept, report.best_validation_perplexity
    if gain_kept is not None and round(gain_kept, 2) < 1:
        text += f" The trained model had {show(report.trained_validation_perplexity)}: "
        text += f"its files keep {show_percent(max(0.0, gain_kept))} of the gain."
    elif best < report.last_validation_perplexity * 0.999:
        text += f" The best was {show(best)}, at step {show(report.best_validation_step)}."
    if report.fuse == "never":
        text += " Its adapters lie beside the base model: a tool that does not apply them opens the base model."
    return text


def _accuracy(run: Run) -> Iterator[Answer]:
    for _, report, question in _of_each(
        run, EvaluateReport, "How often is it right?", "How often is it right, by {name}?"
    ):
        first = report.accuracies[0]
        own = [row for row in report.accuracies if row.model == first.model]
        tasks = [f"{show_percent(row.accuracy)} on {clean(row.task)}" for row in own[1:_SUMMED_TASKS]]
        text = f"of {plural(first.items, 'item')} of {clean(first.task)} by {clean(first.model)}"
        text += f"; {', '.join(tasks)}." if tasks else "."
        if worse := [row for row in report.differences if row.high < 0]:
            worst = min(worse, key=lambda row: row.difference)
            points = 100 * worst.difference
            text += f" {clean(worst.model)} is {points:+.1f} points from it on {clean(worst.task)}."
        elif report.differences:
            text += " No other model is worse by more than the noise."
        yield Answer(question, show_percent(first.accuracy), text, "evaluation")


def _speed(run: Run) -> Iterator[Answer]:
    for _, report, question in _of_each(run, TrainReport, "How fast was it?", "How fast was {name}?"):
        about = report.run
        text = "tokens learned from a second while training"
        whole = about.training_seconds
        text += f"; {show_percent(about.data_wait_seconds / whole)} of the time it waited for data" if whole else ""
        yield Answer(question, show(about.tokens_per_second), f"{text}.", "learning")


def _size(run: Run) -> Iterator[Answer]:
    built = [(stage, figures) for stage in run.stages if (figures := stage.figures(QuantizeReport)) is not None]
    measured = {row.model: row for bench in run.stages for row in _models(bench)}
    for one, report in built:
        yield Answer(
            f"How small is {_name(one)}?",
            show(report.compression_ratio_fp32),
            f"{_sized(report, measured.get(one.task))}.",
            "quantization",
        )
    if run.of_kind("quantize") and not built:
        yield Answer("How small is it?", UNKNOWN, "No quantized model was reported.", "quantization")


def _decode(run: Run) -> Iterator[Answer]:
    """Yield how fast each quantized model writes, compared with the model that it was made from."""
    rows = {row.model: row for bench in run.stages for row in _models(bench)}
    for one in run.of_kind("quantize"):
        row = rows.get(one.task)
        if row is None or one.report is None:
            continue
        question = f"How fast is {_name(one)}?"
        if row.decode_speed is None:
            said = f"was not measured: {clean(row.error or 'the benchmark reported no speed')}."
            yield Answer(question, UNKNOWN, said, "benchmark")
            continue
        dense = next((rows[task] for task in one.member.reads if task in rows), None)
        said = "tokens a second in writing" + _against_dense(row, dense)
        yield Answer(question, show(row.decode_speed.value), f"{said}.", "benchmark")


def _against_dense(row: ModelRow, dense: ModelRow | None) -> str:
    """Return the speed of a model against the one that it was made from, in words."""
    if dense is None or row.decode_speed is None or dense.decode_speed is None:
        return ""
    own, other = row.decode_speed, dense.decode_speed
    word = "faster" if own.low > other.high else "slower" if own.high < other.low else "the same within the noise"
    return f", {show(own.value / other.value)} times those of {clean(dense.model)} ({show(other.value)}): {word}"


def _models(bench: LoadedStage) -> tuple[ModelRow, ...]:
    report = bench.figures(BenchmarkReport)
    return report.models if report else ()


def _sized(report: QuantizeReport, row: ModelRow | None) -> str:
    """Return size and quality of a quantized model in words; the quality from the benchmark if its report has none."""
    text = f"times smaller than in fp32{_than_dense(report)}: "
    text += f"{show_bytes(report.model_bytes)}, {show(report.bits_per_weight)} bits a weight"
    of = report.quality or row
    if of is not None and of.perplexity is not None:
        text += f"; perplexity {show_interval(of.perplexity, of.perplexity_standard_error)}"
    if report.quality:
        text += f", dense {show(report.quality.dense_perplexity)}" + _another_model(report.quality)
    return text


def _than_dense(report: QuantizeReport) -> str:
    """Return the size relative to the stored dense model, if that is not in fp32."""
    dense, own = report.dense_bits_per_weight, report.bits_per_weight
    if not own or dense > 31:
        return ""
    return f", {show(dense / own)} times smaller than the dense model of {show(dense)} bits a weight"


# A divergence is called rounding if this share of it shows in the perplexity, or if it is this small
_SHOWN_SHARE, _ROUNDING_NATS = 0.5, 0.03


def _another_model(quality: QualityFigures) -> str:
    """Return a sentence if the divergence shows a difference that the perplexity does not.

    If text were distributed as the dense model predicts, rounding would raise the loss by the divergence. A model
    that was trained in between predicts the text better again, but differs from the dense model.
    """
    kl, perplexity, dense = quality.kl, quality.perplexity, quality.dense_perplexity
    if (
        perplexity <= 0
        or dense <= 0
        or kl < _ROUNDING_NATS
        or math.log(perplexity) - math.log(dense) > _SHOWN_SHARE * kl
    ):
        return ""
    text = f"; but its predictions diverge from the dense model's by {show(kl)} nats a token"
    text += f" and share {show_percent(quality.top1_agreement)} of first choices"
    return f"{text}: not the dense model made smaller, another one that fits this text"


def _memory(run: Run) -> Iterator[Answer]:
    if not run.of_kind("profile"):
        return
    reported = _of_each(run, ProfileReport, "Where does memory go?", "Where does memory go in {name}?")
    if not reported:
        yield _memory_until_the_end(run) or Answer(
            "Where does memory go?", UNKNOWN, "No memory profile was reported.", "memory"
        )
    for _, report, question in reported:
        yield Answer(question, show_bytes(report.peak_memory_bytes), _peak(report), "memory")


def _peak(report: ProfileReport) -> str:
    """Return the result of a profile in a sentence."""
    text = "in MLX's arrays at the peak of a training step" + _largest_part(report.composition)
    verdict = {"none": "no leak", "leak": "a leak was found"}.get(report.leak.verdict, report.leak.verdict)
    return f"{text}; {verdict}."


def _largest_part(composition: PeakParts) -> str:
    """Return the largest part of MLX's arrays with its share."""
    sizes = {part: size for part in ARRAYS if (size := getattr(composition, f"{part}_bytes"))}
    if not sizes:
        return ""
    most = max(sizes, key=lambda part: sizes[part])
    share = sizes[most] / sum(sizes.values())
    word = "most of it" if share > 0.5 else "the largest part of it"
    return f", {word} {most} ({show_bytes(sizes[most])}, {share:.0%})"


def _memory_until_the_end(run: Run) -> Answer | None:
    """Return the peak memory that an unfinished profile measured."""
    for one in run.of_kind("profile"):
        if left := run.cut_off.get(one.task):
            peaks = [float(left.columns[key].max()) for key in _PEAKS if len(left.columns.get(key, ()))]
            peaks += [phase.peak_bytes for phase in left.phases]
            text = f"at most until the profile ended: it {clean(left.ended)}."
            return Answer("Where does memory go?", show_bytes(max(peaks, default=None)), text, "memory")
    return None


def _gain(run: Run) -> Iterator[Answer]:
    if not run.of_kind("benchmark"):
        return
    unknown = "No baseline was measured beside the workflow's own settings."
    reported = _of_each(run, BenchmarkReport, "Is it worth it?", "Is it worth it in {name}?")
    if not reported:
        yield Answer("Is it worth it?", UNKNOWN, unknown, "benchmark")
    for _, report, question in reported:
        if not report.training:  # only models were measured
            continue
        speed = _promised_speed(report) or _compared_speed(report)
        if speed is None:
            yield Answer(question, UNKNOWN, unknown, "benchmark")
            continue
        ratio, low, high = speed
        noise = " That is inside the noise." if low <= 1 <= high else ""
        text = f"times the speed of the plain baseline ({show(low)} to {show(high)}).{noise}"
        yield Answer(question, show(ratio), text, "benchmark")


def _promised_speed(report: BenchmarkReport) -> tuple[float, float, float] | None:
    """Return the workflow's speed over the baseline's with its interval, from paired rounds."""
    speed = report.promises.get("training_speed")
    if speed is None or speed.measured is None or speed.low is None or speed.high is None:
        return None
    return speed.measured, speed.low, speed.high


def _compared_speed(report: BenchmarkReport) -> tuple[float, float, float] | None:
    """Return the same from the figures of the first batch size at which both were timed."""
    timed = {(row.name, row.batch_size): speed for row in report.training if (speed := row.speed) is not None}
    for (name, size), speed in timed.items():
        base = timed.get(("baseline", size))
        if name == "workflow" and base:
            return speed.value / base.value, speed.low / base.high, speed.high / base.low
    return None
