"""The first lines of the page: each question a person comes with, and its answer in a figure and a sentence."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from mlxflow.report.elements import Answer
from mlxflow.report.formatting import (
    UNKNOWN,
    clean,
    number,
    plural,
    show,
    show_bytes,
    show_interval,
    show_large,
    show_percent,
    show_seconds,
)
from mlxflow.report.load_run import LoadedStage, Run, rows, table
from mlxflow.report.sections.benchmark import interval
from mlxflow.report.sections.memory import ARRAYS
from mlxflow.report.sections.stages import WORDS

_PEAKS = ("peak_memory_bytes", "sample_peak_memory_bytes")


def answers(run: Run) -> list[Answer]:
    """Return the answers that the reports hold; what is not known is said."""
    found = [_state(run)]
    for answer in (_data, _quality, _speed, _size, _memory, _gain):
        found += answer(run)
    return found


def _first(run: Run, kind: str) -> LoadedStage | None:
    return next((one for one in run.of_kind(kind) if one.report), None)


def _state(run: Run) -> Answer:
    fresh = sum(one.state == "fresh" for one in run.stages)
    seconds = [number(table(one.report, "run").get("seconds")) for one in run.stages]
    took = show_seconds(sum(one for one in seconds if one))
    rest = [f"{one.task} is {WORDS[one.state]}" for one in run.stages if one.state != "fresh"]
    said = f"stages built; together they took {took}."
    return Answer(
        "Is it done?", f"{fresh} of {len(run.stages)}", said + (f" {'; '.join(rest)}." if rest else ""), "stages"
    )


def _data(run: Run) -> Iterator[Answer]:
    if not _first(run, "pretokenize"):
        yield Answer("What was it made of?", UNKNOWN, "No corpus was reported.", "data")
    for one, question in _of_each(run, "pretokenize", "What was it made of?", "What is {name} made of?"):
        tokens = table(one.report, "train").get("tokens")
        yield Answer(question, show_large(tokens), _corpus(one), "data")


def _corpus(one: LoadedStage) -> str:
    """Return what a corpus holds, in sentences."""
    train, held = table(one.report, "train"), table(one.report, "validation")
    said = f"tokens of {plural(train.get('documents'), 'document')} to learn from, "
    said += f"{show_large(held.get('tokens'))} held out."
    bad = sum(count for source in rows(one.report, "sources") if (count := number(source.get("bad_records"))))
    dropped = sum(
        count for side in (train, held) for key in ("dropped", "truncated") if (count := number(side.get(key)))
    )
    said += f" {plural(bad, 'record')} could not be read." if bad else ""
    return said + (f" {plural(dropped, 'document')} dropped or cut short." if dropped else "")


def _of_each(run: Run, kind: str, one: str, several: str) -> Iterator[tuple[LoadedStage, str]]:
    """Yield the variants of a stage that were reported, each with the question about it.

    Args:
        run: the run.
        kind: the stage.
        one: the question where the stage has no variants.
        several: the question with `{name}` where it has.
    """
    stages = run.of_kind(kind)
    for found in (stage for stage in stages if stage.report):
        name = clean(found.member.task.partition(":")[2] or found.task)
        yield found, one if len(stages) == 1 else several.format(name=name)


def _quality(run: Run) -> Iterator[Answer]:
    if not _first(run, "train"):
        yield Answer("Did it learn?", UNKNOWN, "No training was reported.", "learning")
    for one, question in _of_each(run, "train", "Did it learn?", "Did {name} learn?"):
        yield Answer(question, show(number(one.report.get("last_validation_perplexity"))), _learned(one), "learning")


def _learned(one: LoadedStage) -> str:
    """Return what a training came to, in sentences."""
    first, last = (number(one.report.get(f"{which}_validation_perplexity")) for which in ("first", "last"))
    said = f"perplexity on held-out text after {plural(one.report.get('steps'), 'step')}"
    said += f", from {show(first)} before." if first is not None else "."
    kept, trained = (number(one.report.get(key)) for key in ("gain_kept", "trained_validation_perplexity"))
    best = number(one.report.get("best_validation_perplexity"))
    if kept is not None and round(kept, 2) < 1:
        said += f" The trained model had {show(trained)}: its files keep {show_percent(max(0.0, kept))} of the gain."
    elif best is not None and last is not None and best < last * 0.999:
        said += f" The best was {show(best)}, at step {show(one.report.get('best_validation_step'))}."
    if one.report.get("fuse") == "never":
        said += " Its adapters lie beside the base model: a tool that does not apply them opens the base model."
    return said


def _speed(run: Run) -> Iterator[Answer]:
    for one, question in _of_each(run, "train", "How fast was it?", "How fast was {name}?"):
        about = table(one.report, "run")
        said = "tokens learned from a second while training"
        waited, whole = number(about.get("data_wait_seconds")), number(about.get("training_seconds"))
        said += (
            f"; {show_percent(waited / whole)} of the time it waited for data" if waited is not None and whole else ""
        )
        yield Answer(question, show(about.get("tokens_per_second")), f"{said}.", "learning")


def _size(run: Run) -> Iterator[Answer]:
    built = [one for one in run.of_kind("quantize") if one.report]
    measured = {
        str(row.get("model")): row for bench in run.of_kind("benchmark") for row in rows(bench.report, "models")
    }
    for one in built:
        ratio = number(one.report.get("compression_ratio_fp32", one.report.get("compression_ratio")))
        quality, row = table(one.report, "quality"), measured.get(one.task, {})
        of = quality if number(quality.get("perplexity")) is not None else row
        weight = f"{show(one.report.get('bits_per_weight'))} bits a weight"
        said = f"times smaller than in fp32{_than_dense(one.report)}: "
        said += f"{show_bytes(one.report.get('model_bytes'))}, {weight}"
        if number(of.get("perplexity")) is not None:
            said += f"; perplexity {show_interval(of.get('perplexity'), of.get('perplexity_standard_error'))}"
        dense = number(quality.get("dense_perplexity"))
        said += f", dense {show(dense)}" if dense is not None else ""
        said += _another_model(quality)
        yield Answer(
            f"How small is {clean(one.member.task.partition(':')[2] or one.task)}?",
            show(ratio),
            f"{said}.",
            "quantization",
        )
    if run.of_kind("quantize") and not built:
        yield Answer("How small is it?", UNKNOWN, "No quantized model was reported.", "quantization")


def _than_dense(report: Mapping[str, Any]) -> str:
    """Return the size against the dense model as it was stored, where that was not fp32."""
    dense, own = (number(report.get(key)) for key in ("dense_bits_per_weight", "bits_per_weight"))
    if dense is None or not own or dense > 31:
        return ""
    return f", {show(dense / own)} times smaller than the dense model of {show(dense)} bits a weight"


# Of a divergence so much must show in the perplexity, or be this small, to be called rounding
_SHOWN_SHARE, _ROUNDING_NATS = 0.5, 0.03


def _another_model(quality: Mapping[str, Any]) -> str:
    """Return what a divergence says that the perplexity does not.

    Were text what the dense model holds likely, rounding would raise the loss by the divergence. A model that was
    trained meanwhile predicts the text better again, and still is another one.
    """
    kl, found, dense = (number(quality.get(key)) for key in ("kl", "perplexity", "dense_perplexity"))
    if kl is None or not found or not dense or kl < _ROUNDING_NATS or math.log(found / dense) > _SHOWN_SHARE * kl:
        return ""
    said = f"; but its predictions diverge from the dense model's by {show(kl)} nats a token"
    same = number(quality.get("top1_agreement"))
    said += f" and share {show_percent(same)} of first choices" if same is not None else ""
    return f"{said}: not the dense model made smaller, another one that fits this text"


def _memory(run: Run) -> Iterator[Answer]:
    if not run.of_kind("profile"):
        return
    if not _first(run, "profile"):
        yield _memory_until_the_end(run) or Answer(
            "Where does memory go?", UNKNOWN, "No memory profile was reported.", "memory"
        )
    for one, question in _of_each(run, "profile", "Where does memory go?", "Where does memory go in {name}?"):
        yield Answer(question, show_bytes(one.report.get("peak_memory_bytes")), _peak(one), "memory")


def _peak(one: LoadedStage) -> str:
    """Return what a profile found, in a sentence."""
    said = "in MLX's arrays at the peak of a training step" + _largest_part(table(one.report, "composition"))
    verdict = table(one.report, "leak").get("verdict")
    said += (
        {"none": "; no leak", "leak": "; a leak was found"}.get(verdict, f"; {clean(verdict)}")
        if isinstance(verdict, str)
        else ""
    )
    return f"{said}."


def _largest_part(composition: Mapping[str, Any]) -> str:
    """Return which part of MLX's arrays is the largest, with its share of them."""
    made = {part: size for part in ARRAYS if (size := number(composition.get(f"{part}_bytes")))}
    if not made:
        return ""
    most = max(made, key=lambda part: made[part])
    share = made[most] / sum(made.values())
    word = "most of it" if share > 0.5 else "the largest part of it"
    return f", {word} {most} ({show_bytes(made[most])}, {share:.0%})"


def _memory_until_the_end(run: Run) -> Answer | None:
    """Return the most that a profile which did not come to its end saw."""
    for one in run.of_kind("profile"):
        if left := run.cut_off.get(one.task):
            peaks = [float(left.columns[key].max()) for key in _PEAKS if len(left.columns.get(key, ()))]
            peaks += [phase.peak_bytes for phase in left.phases]
            said = f"at most until the profile ended: it {clean(left.ended)}."
            return Answer("Where does memory go?", show_bytes(max(peaks, default=None)), said, "memory")
    return None


def _gain(run: Run) -> Iterator[Answer]:
    if not run.of_kind("benchmark"):
        return
    unknown = "No baseline was measured beside the workflow's own settings."
    if not _first(run, "benchmark"):
        yield Answer("Is it worth it?", UNKNOWN, unknown, "benchmark")
    for one, question in _of_each(run, "benchmark", "Is it worth it?", "Is it worth it in {name}?"):
        speed = _promised_speed(one.report) or _compared_speed(one.report)
        if speed is None:
            yield Answer(question, UNKNOWN, unknown, "benchmark")
            continue
        ratio, low, high = speed
        noise = " That is inside the noise." if low <= 1 <= high else ""
        text = f"times the speed of the plain baseline ({show(low)} to {show(high)}).{noise}"
        yield Answer(question, show(ratio), text, "benchmark")


def _promised_speed(report: Mapping[str, Any]) -> tuple[float, float, float] | None:
    """Return the workflow's speed over the baseline's with its interval, from rounds taken together."""
    told = table(report, "promises", "training_speed")
    ratio, low, high = (number(told.get(key)) for key in ("measured", "low", "high"))
    return (ratio, low, high) if ratio is not None and low is not None and high is not None else None


def _compared_speed(report: Mapping[str, Any]) -> tuple[float, float, float] | None:
    """Return the same from the figures of the first batch size that both were timed at."""
    named = [row for row in rows(report, "training") if isinstance(row.get("name"), str)]
    timed = {(row["name"], number(row.get("batch_size"))): interval(row) for row in named}
    for (name, size), (speed, low, high) in timed.items():
        base, base_low, base_high = timed.get(("baseline", size), (None, None, None))
        if name == "workflow" and speed and base:
            least = low / base_high if low is not None and base_high else speed / base
            most = high / base_low if high is not None and base_low else speed / base
            return speed / base, least, most
    return None
