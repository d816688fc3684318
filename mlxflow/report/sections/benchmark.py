"""The benchmark: speed of training with intervals, models, convergence, where a step's time goes, promises."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mlxflow.report import charts, line_plot
from mlxflow.report.charts import Bar
from mlxflow.report.elements import Block, Figure, Note, Section, Table, Text
from mlxflow.report.formatting import clean, number, show, show_bytes, show_interval, show_percent, show_seconds
from mlxflow.report.line_plot import Axes, Series
from mlxflow.report.load_run import LoadedStage, Run, rows, table
from mlxflow.report.sections import beside

_SHARES = (
    ("data_share", "waiting for data"),
    ("graph_share", "building the graph"),
    ("compute_share", "computing"),
    ("synchronize_share", "synchronizing"),
)


def section(runs: Sequence[Run]) -> Section:
    """Return the section."""
    return Section("benchmark", "Benchmark", _pairs(runs) + beside(runs, _blocks))


def _pairs(runs: Sequence[Run]) -> list[Block]:
    """Return the figures that two runs both have as pairs of bars on one scale."""
    if len(runs) < 2:
        return []
    blocks: list[Block] = []
    figures = (
        ("training", "tokens_per_second", "Training: tokens learned from per second, both runs", "number"),
        ("models", "decode_tokens_per_second", "Decode, tokens per second, both runs", "number"),
        ("models", "model_bytes", "Size of the model, both runs", "bytes"),
    )
    for key, figure, title, form in figures:
        known, other = (_intervals(run, key, figure) for run in runs)
        bars, cells = [], []
        for name in (name for name in known if name in other):
            for run, style, told in zip(runs, ("c0", "c0 b"), (known[name], other[name]), strict=True):
                bars.append(Bar(f"{name}, {_letter(run)}", max(0.0, told[0]), told[1], told[2], style))
            words = [charts.FORMATS[form](told[0]) for told in (known[name], other[name])]
            cells.append((name, *words, _ratio(known[name], other[name])))
        if bars:
            label = f"{title}. " + " ".join(f"{bar.name}: {charts.FORMATS[form](bar.value)}." for bar in bars)
            head = ("Setting", *(run.label for run in runs), f"{_letter(runs[1])} against {_letter(runs[0])}")
            table_ = Table(f"{title}, in figures", head, cells, folded=True, words=(0, 3))
            legend = tuple((f"{style} box", run.label) for run, style in zip(runs, ("c0", "c0 b"), strict=True))
            drawn = charts.bars(bars, label=label, form=form)
            blocks.append(Figure(title, drawn, table_, legend, wide=key == "training"))
    return blocks


_Known = tuple[float, float | None, float | None]


def _intervals(run: Run, key: str, figure: str) -> dict[str, _Known]:
    """Return a figure with the ends of its interval by the name of its row."""
    found: dict[str, _Known] = {}
    for one in run.of_kind("benchmark"):
        for row in rows(one.report, key):
            name = row_name(row) if key == "training" else clean(str(row.get("model", "a model")))
            if (value := number(row.get(figure))) is not None:
                found.setdefault(name, (value, number(row.get(f"low_{figure}")), number(row.get(f"high_{figure}"))))
    return found


def _letter(run: Run) -> str:
    return run.label.partition(":")[0]


def _ratio(one: _Known, other: _Known) -> str:
    """Return how many times the second is the first, in words."""
    if not one[0]:
        return show(None)
    said = f"{show(other[0] / one[0])} times"
    (low, high), (other_low, other_high) = one[1:], other[1:]
    if not low or not high or other_low is None or other_high is None:
        return said
    least, most = other_low / high, other_high / low
    return f"{said} ({show(least)} to {show(most)})" + (", inside the noise" if least <= 1 <= most else "")


def _blocks(run: Run) -> list[Block]:
    blocks: list[Block] = []
    for one in run.of_kind("benchmark"):
        if not one.report:
            blocks.append(Note(f"No benchmark to show: {one.said}"))
            continue
        for part in (_training, _drift, _models, _convergence, _bottleneck, _promises):
            blocks += part(one)
    return blocks or [Note("No benchmark to show: the workflow has no benchmark stage.")]


def row_name(row: dict[str, Any]) -> str:
    """Return the name of a row of training figures."""
    name = row.get("name")
    size = f"{show(row.get('batch_size'))} rows"
    return f"{clean(name)}, {size}" if isinstance(name, str) else size


def interval(row: dict[str, Any]) -> tuple[float | None, float | None, float | None]:
    """Return tokens per second of a row with the ends of its interval."""
    known = [number(row.get(key)) for key in ("tokens_per_second", "low_tokens_per_second", "high_tokens_per_second")]
    return known[0], known[1], known[2]


def _training(one: LoadedStage) -> list[Block]:
    bars, cells = [], []
    for row in rows(one.report, "training"):
        speed, low, high = interval(row)
        name = row_name(row)
        if speed is not None:
            style = "c1" if row.get("name") == "baseline" else "c0"
            bars.append(Bar(name, max(0.0, speed), low, high, style))
        cells.append(
            (
                name,
                show(row.get("processed_tokens_per_second")),
                show(speed),
                f"{show(low)} \N{EN DASH} {show(high)}" if low is not None else show(None),
                show_seconds(row.get("median_step_seconds")),
                show_bytes(row.get("peak_memory_bytes")),
                show(row.get("tokens_per_second_per_gb")),
                show_percent(row.get("data_wait_share")),
                show_seconds(row.get("compile_seconds")),
            )
        )
    failures = _failures(rows(one.report, "training"))
    if not bars:
        return failures or [Note("The benchmark reported no speed of training.")]
    label = "Tokens learned from per second while training. " + " ".join(
        f"{bar.name}: {show(bar.value)}." for bar in bars
    )
    head = (
        "Setting",
        "Tokens processed/s",
        "Learned from/s",
        "Interval",
        "Step",
        "Peak memory",
        "Tokens/s a GB",
        "Data wait",
        "Compiling",
    )
    caption = "Training: tokens learned from, per second"
    caption += ", with intervals" if any(bar.low is not None for bar in bars) else ""
    figures = Table("Training in figures", head, cells, folded=True)
    blocks: list[Block] = [Figure(caption, charts.bars(bars, label=label), figures, wide=True)]
    if not any(bar.low is not None for bar in bars):
        blocks.append(Note("The benchmark reported no intervals for these speeds."))
    return blocks + failures


def _models(one: LoadedStage) -> list[Block]:
    found = rows(one.report, "models")
    if not found:
        return [Note("The benchmark reported no models.")]
    cells = []
    for row in found:
        prefill = [
            f"{show(point.get('tokens_per_second'))} at {show(point.get('prompt_tokens'))}"
            for point in rows(row, "prefill")
        ]
        cells.append(
            (
                clean(str(row.get("model", "a model"))),
                show_bytes(row.get("model_bytes")),
                show(row.get("compression_ratio_fp32")),
                show(row.get("compression_ratio")),
                show_interval(row.get("perplexity"), row.get("perplexity_standard_error")),
                "; ".join(prefill) or show(None),
                show(row.get("decode_tokens_per_second")),
                show_bytes(row.get("peak_memory_bytes")),
            )
        )
    head = (
        "Model",
        "Size",
        "Times smaller than fp32",
        "Than the trained model",
        "Perplexity",
        "Prefill, tokens/s at tokens",
        "Decode, tokens/s",
        "Peak memory",
    )
    blocks: list[Block] = [Table("Models", head, cells, words=(0, 5))]
    for key, title, form in (
        ("model_bytes", "Size of the model", "bytes"),
        ("decode_tokens_per_second", "Decode, tokens per second", "number"),
    ):
        bars = [
            Bar(
                clean(str(row.get("model", "a model"))),
                max(0.0, size),
                number(row.get(f"low_{key}")),
                number(row.get(f"high_{key}")),
                "c3" if form == "bytes" else "c2",
            )
            for row in found
            if (size := number(row.get(key))) is not None
        ]
        if bars:
            label = f"{title}. " + " ".join(f"{bar.name}: {charts.FORMATS[form](bar.value)}." for bar in bars)
            blocks.append(Figure(title, charts.bars(bars, label=label, form=form)))
    return blocks + _failures(found)


def _convergence(one: LoadedStage) -> list[Block]:
    blocks: list[Block] = []
    for key, title, form in (("tokens", "Loss over tokens", "number"), ("seconds", "Loss over seconds", "seconds")):
        if series := _loss_curves(one, key):
            label = f"{title}. " + " ".join(f"{s.name}: {show(float(s.y[-1]))} in the end." for s in series)
            plot = line_plot.lines(series, Axes(key, x_form=form), label=label, height=180)
            cells = [(s.name, show(float(s.x[-1])), show(float(s.y[-1]), 4)) for s in series]
            figures = Table("Where each ends", ("Run", key.capitalize(), "Loss"), cells, folded=True)
            blocks.append(Figure(title, plot, figures, tuple((s.style, s.name) for s in series)))
    return blocks + _to_the_same_loss(one) if blocks else [Note("The benchmark reported no convergence.")]


def _loss_curves(one: LoadedStage, key: str) -> list[Series]:
    """Return the loss of each run over a column of its curve."""
    series = []
    for index, row in enumerate(rows(one.report, "convergence")):
        x, y = row.get(key), row.get("loss")
        pairs = list(zip(x, y, strict=False)) if isinstance(x, list) and isinstance(y, list) else []
        known = sorted((a, b) for p, q in pairs if (a := number(p)) is not None and (b := number(q)) is not None)
        if known:
            name = clean(str(row.get("name", "a run")))
            across, up = np.array([a for a, _ in known]), np.array([b for _, b in known])
            series.append(Series(name, across, up, charts.style_of(index)))
    return series


def _to_the_same_loss(one: LoadedStage) -> list[Block]:
    """Return what each run took to a loss that all of them reached."""
    curves = rows(one.report, "convergence")
    known = [row for row in curves if number(row.get("tokens_to_loss")) is not None]
    loss = number(known[0].get("same_loss")) if known else None
    if loss is None:
        return []
    took = [
        f"{clean(str(row.get('name', 'a run')))} {show(row['tokens_to_loss'])} tokens "
        f"and {show_seconds(row.get('seconds_to_loss'))}"
        for row in known
    ]
    return [Text(f"To a loss of {show(loss)} it took {'; '.join(took)}.")]


def _bottleneck(one: LoadedStage) -> list[Block]:
    told = table(one.report, "bottleneck")
    shares = [(name, number(told.get(key)), f"c{index}") for index, (key, name) in enumerate(_SHARES)]
    known = [(name, max(0.0, share), style) for name, share, style in shares if share is not None]
    if not known:
        return [Note("The benchmark did not report where a step's time goes.")]
    label = "Where a step's time goes: " + ", ".join(f"{name} {show_percent(share)}" for name, share, _ in known)
    legend = tuple((f"{style} box", f"{name} {show_percent(share)}") for name, share, style in known)
    blocks: list[Block] = [
        Figure("Where a step's time goes", charts.stacked(known, label=label), legend=legend, wide=True)
    ]
    for rate, ceiling, what, unit in (
        ("flops_per_second", "ceiling_flops_per_second", "Arithmetic", "FLOP/s"),
        ("decode_bytes_per_second", "ceiling_bytes_per_second", "Decoding reads", "B/s"),
    ):
        found, most = number(told.get(rate)), number(told.get(ceiling))
        if found is not None and most:
            figures = f"{show(found / 1e9)} of {show(most / 1e9)} G{unit}"
            blocks.append(
                Text(f"{what}: {figures}, {show_percent(found / most)} of what this device was measured to do.")
            )
    advice = told.get("advice")
    if isinstance(advice, str) and advice:
        blocks.append(Text(f"Most worth changing: {advice}"))
    return blocks


def _failures(found: Sequence[dict[str, Any]]) -> list[Block]:
    """Return why rows have no figures."""
    named = [(str(row.get("model") or row_name(row)), row.get("error")) for row in found]
    return [Note(f"{clean(name)}: {error}") for name, error in named if isinstance(error, str)]


def _drift(one: LoadedStage) -> list[Block]:
    told = table(one.report, "drift")
    ratio = number(told.get("ratio"))
    if ratio is None:
        return []
    said = f"The first setting, timed again at the end, took {show(ratio)} times as long a step."
    return [Note(f"{said} The device slowed down meanwhile.") if told.get("is_noticed") is True else Text(said)]


def _promises(one: LoadedStage) -> list[Block]:
    cells = []
    for name, told in table(one.report, "promises").items():
        known = told if isinstance(told, dict) else {"figure": _word(told)}
        figure = _word(known.get("figure", known.get("measured", "not measured")))
        cells.append((str(known.get("promise", name.replace("_", " "))), figure, _word(known.get("holds"))))
    return [Table("Promises", ("Promise", "Measured here", "Held"), cells, words=(0, 1, 2))] if cells else []


def _word(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{key.replace('_', ' ')} {_word(part)}" for key, part in value.items())
    return clean(value) if isinstance(value, str) else show(value)
