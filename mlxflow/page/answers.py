"""The first lines of the page: each question a person comes with, and its answer in a figure and a sentence."""

from collections.abc import Iterator, Mapping
from typing import Any

from mlxflow.page.blocks import Answer
from mlxflow.page.reading import Run, StageRun, rows, table
from mlxflow.page.sections.benchmark import interval
from mlxflow.page.sections.memory import ARRAYS
from mlxflow.page.sections.stages import WORDS
from mlxflow.page.text import (
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

_PEAKS = ("peak_memory_bytes", "sample_peak_memory_bytes")


def answers(run: Run) -> list[Answer]:
    """Return the answers that the reports hold; what is not known is said."""
    found = [_state(run)]
    for answer in (_data, _quality, _speed, _size, _memory, _gain):
        found += answer(run)
    return found


def _first(run: Run, kind: str) -> StageRun | None:
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
    if not (one := _first(run, "pretokenize")):
        yield Answer("What was it made of?", UNKNOWN, "No corpus was reported.", "data")
        return
    train, held = table(one.report, "train"), table(one.report, "validation")
    said = f"tokens of {plural(train.get('documents'), 'document')} to learn from, "
    said += f"{show_large(held.get('tokens'))} held out."
    bad = sum(count for source in rows(one.report, "sources") if (count := number(source.get("bad_records"))))
    dropped = sum(
        count for side in (train, held) for key in ("dropped", "truncated") if (count := number(side.get(key)))
    )
    said += f" {plural(bad, 'record')} could not be read." if bad else ""
    said += f" {plural(dropped, 'document')} dropped or cut short." if dropped else ""
    yield Answer("What was it made of?", show_large(train.get("tokens")), said, "data")


def _quality(run: Run) -> Iterator[Answer]:
    if not (one := _first(run, "train")):
        yield Answer("Did it learn?", UNKNOWN, "No training was reported.", "learning")
        return
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
    yield Answer("Did it learn?", show(last), said, "learning")


def _speed(run: Run) -> Iterator[Answer]:
    if one := _first(run, "train"):
        about = table(one.report, "run")
        said = "tokens a second while training"
        waited, whole = number(about.get("data_wait_seconds")), number(about.get("training_seconds"))
        said += (
            f"; {show_percent(waited / whole)} of the time it waited for data" if waited is not None and whole else ""
        )
        yield Answer("How fast was it?", show(about.get("tokens_per_second")), f"{said}.", "learning")


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
        said = f"times smaller than in fp32: {show_bytes(one.report.get('model_bytes'))}, {weight}"
        if number(of.get("perplexity")) is not None:
            said += f"; perplexity {show_interval(of.get('perplexity'), of.get('perplexity_standard_error'))}"
        dense = number(quality.get("dense_perplexity"))
        said += f", dense {show(dense)}" if dense is not None else ""
        yield Answer(
            f"How small is {clean(one.member.task.partition(':')[2] or one.task)}?",
            show(ratio),
            f"{said}.",
            "quantization",
        )
    if run.of_kind("quantize") and not built:
        yield Answer("How small is it?", UNKNOWN, "No quantized model was reported.", "quantization")


def _memory(run: Run) -> Iterator[Answer]:
    if not run.of_kind("profile"):
        return
    if not (one := _first(run, "profile")):
        yield _memory_until_the_end(run) or Answer(
            "Where does memory go?", UNKNOWN, "No memory profile was reported.", "memory"
        )
        return
    peak = one.report.get("peak_memory_bytes")
    said = "in MLX's arrays at the peak of a training step" + _largest_part(table(one.report, "composition"))
    verdict = table(one.report, "leak").get("verdict")
    said += (
        {"none": "; no leak", "leak": "; a leak was found"}.get(verdict, f"; {clean(verdict)}")
        if isinstance(verdict, str)
        else ""
    )
    yield Answer("Where does memory go?", show_bytes(peak), f"{said}.", "memory")


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
    one = _first(run, "benchmark")
    told = _promised_speed(one.report) or _compared_speed(one.report) if one else None
    if told is None:
        said = "No baseline was measured beside the workflow's own settings."
        yield Answer("Is it worth it?", UNKNOWN, said, "benchmark")
        return
    ratio, low, high = told
    noise = " That is inside the noise." if low <= 1 <= high else ""
    said = f"times the speed of the plain baseline ({show(low)} to {show(high)}).{noise}"
    yield Answer("Is it worth it?", show(ratio), said, "benchmark")


def _promised_speed(report: Mapping[str, Any]) -> tuple[float, float, float] | None:
    """Return the workflow's speed over the baseline's with its interval, from rounds taken together."""
    told = table(report, "promises", "training_speed")
    ratio, low, high = (number(told.get(key)) for key in ("measured", "low", "high"))
    return (ratio, low, high) if ratio is not None and low is not None and high is not None else None


def _compared_speed(report: Mapping[str, Any]) -> tuple[float, float, float] | None:
    """Return the same from the figures of the first batch size that both were timed at."""
    timed = {(row.get("name"), row.get("batch_size")): interval(row) for row in rows(report, "training")}
    for (name, size), (speed, low, high) in timed.items():
        base, base_low, base_high = timed.get(("baseline", size), (None, None, None))
        if name == "workflow" and speed and base:
            least = low / base_high if low is not None and base_high else speed / base
            most = high / base_low if high is not None and base_low else speed / base
            return speed / base, least, most
    return None
