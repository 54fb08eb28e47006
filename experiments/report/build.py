"""The command ``report``: one HTML page of a folder of results, and the PNG and CSV behind it.

What it says of the paper's claims is computed in :mod:`experiments.report.findings`, and how a
page looks is in :mod:`experiments.report.page`; here is what is on it.
"""

import dataclasses
import datetime
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.configs import CONFIGS
from experiments.methods import METHODS
from experiments.report import findings, paper
from experiments.report.figures import Band, accuracy_range, plot_bands, plot_times
from experiments.report.findings import Group, Results, Run, Spread, percent, share
from experiments.report.page import (
    Cell,
    Figure,
    Section,
    Table,
    count_cell,
    number_columns,
    read_panel,
    significant_cell,
    text_columns,
    write_csv,
    write_page,
    write_table,
)
from experiments.report.tables import format_bytes, format_seconds
from experiments.studies.reproduce import RUNS

_ABSENT = "not at hand"


def write_report(directory: pathlib.Path) -> pathlib.Path:
    """Writes ``report.html`` in a folder of results, and PNG and CSV files in ``report/``.

    Results may be partial: a section without any says which command makes them.

    Returns:
      The path of the page.

    Raises:
      FileNotFoundError: the folder holds no results.
      ValueError: a file in it is not what it should be.
    """
    results = findings.read(directory)
    files = directory / "report"
    files.mkdir(exist_ok=True)
    others = {run.about["config"]["name"] for run in results.runs}
    others -= {"mnist_fc", "cifar10_narrow", "hetero_narrow"}
    names = ["mnist_fc", "cifar10_narrow", *sorted(others)]
    sections = [
        *(_table2(results, name) for name in names),
        _figure2(results, names, files),
        _communication(results, files),
        _figure4(results, files),
        _figure5(results, files),
        _theory(results, files),
        _estimates(results),
        _not_run(results),
        _environment(results),
    ]
    for section in sections:
        for table in section.tables:
            write_table(files, table)
    path = directory / "report.html"
    write_page(
        path,
        "report.html",
        sections=sections,
        verdicts=findings.verdicts(results),
        paper=paper,
        written=f"{datetime.datetime.now():%Y-%m-%d %H:%M}",
        done=sum(run.record is not None for run in results.runs),
    )
    return path


# Table II -----------------------------------------------------------------------------------------


def _table2(results: Results, name: str) -> Section:
    groups = results.standard_groups(name)
    section = Section(f"table2-{name}", f"Table II: {_data_label(groups, name)}")
    if not groups:
        target = "table2" if name in ("mnist_fc", "cifar10_narrow") else None
        section.missing = _reproduce(target) if target else f"python -m experiments compare {name}"
        return section
    section.paragraphs.append(_describe(groups))
    section.paragraphs += [
        f"It does not hold here that {verdict.claim}. {verdict.evidence}"
        for verdict in (findings.uploads_verdict(groups), findings.share_verdict(groups))
        if verdict.status == findings.FAILS
    ]
    section.tables = [_papers_table(groups, name), _honest_table(groups, name)]
    return section


def _papers_table(groups: Sequence[Group], name: str) -> Table:
    uploads, bits = "uploads to the target", "bits to the target"
    is_comparable = any(findings.is_comparable(group) for group in groups)
    logs = ["authors’ logs", "deviation from logs"] if is_comparable else []
    columns = [
        *text_columns("method"),
        *number_columns("seeds at target"),
        *number_columns("paper", "ours", "deviation", *logs, group=uploads),
        *number_columns("paper", "ours", "deviation", group=bits),
    ]
    rows = []
    for group in groups:
        ours, our_bits = group.at_target("uploads"), group.at_target("paper_uplink_bits")
        beside = [Cell("not comparable"), _mean_sd(ours), Cell("–")]
        beside_bits = [Cell("not comparable"), _mean_sd(our_bits, _scientific), Cell("–")]
        beside_logs = [Cell("–") for _ in logs]
        if findings.is_comparable(group):
            papers, papers_bits = paper.MNIST_UPLOADS[group.method], paper.mnist_bits(group.method)
            mean, sd = paper.AUTHORS_UPLOADS[group.method]
            beside[0], beside[2] = count_cell(papers), _deviation(ours, papers, is_bound=True)
            beside_bits[0] = Cell(_scientific(papers_bits), papers_bits)
            beside_bits[2] = _deviation(our_bits, papers_bits, is_bound=True)
            beside_logs = [Cell(f"{mean:,} ± {sd:,}", mean), _deviation(ours, mean)]
        label = Cell(findings.method_label(group.method))
        rows.append([label, _reached(group), *beside, *beside_logs, *beside_bits])
    notes = [
        "Ours: mean ± sample standard deviation over the seeds that reached the target, which is "
        f"checked every {groups[0].config['evaluate_every']} rounds. Bits count 32 for each value "
        "sent up: no indices, no flags, no way down.",
    ]
    if is_comparable:
        notes.append(
            "Authors’ logs: five seeds released with the paper’s code. The paper’s bits are its "
            f"uploads × 32 × {paper.MNIST_PARAMETERS:,}, or × {paper.MNIST_KEPT:,} for the "
            f"{percent(paper.DENSITY, 0)} that sparse methods send. A deviation of more than "
            f"{percent(paper.UPLOADS_TOLERANCE, 0)} from the paper is marked “outside”."
        )
    else:
        notes.append(
            "The paper’s Table II has no cell for this setting; those of its other settings are "
            "not at hand."
        )
    caption = "The paper’s convention: uploads and bits to the target, the paper’s beside ours."
    return Table(f"table2-{name}", caption, columns, rows, notes)


def _honest_table(groups: Sequence[Group], name: str) -> Table:
    to_target, beside, whole = "to the target", "of SGD’s bytes", "whole run"
    has_state = any(record["model_state_bytes"] for g in groups for record in g.records)
    columns = [
        *text_columns("method"),
        *number_columns("rounds", "uploads", "up", "down", "both ways", group=to_target),
        *number_columns("both ways", "up only", group=beside),
        *number_columns(*["model state"] * has_state, "final accuracy", group=whole),
    ]
    up, down = "uplink_bytes", "downlink_bytes"
    sgd = next((group for group in groups if group.method == "sgd"), None)
    rows = []
    for group in groups:
        moved = [group.at_target(*keys) for keys in ((up,), (down,), (up, down))]
        rows.append(
            [
                Cell(findings.method_label(group.method)),
                _mean_sd(group.at_target("iterations")),
                _mean_sd(group.at_target("uploads")),
                *(_bytes(spread) for spread in moved),
                *(_of_sgd(group, sgd, keys) for keys in ((up, down), (up,))),
                *([_bytes(group.in_the_end("model_state_bytes"))] if has_state else []),
                _mean_sd(group.in_the_end("final_test_accuracy"), _accuracy),
            ]
        )
    notes = [
        "Up: values, indices (1, 2 or 4 bytes each) and a flag for each worker and round. Down: "
        "the server’s step to every worker in every round. “Up only” leaves the way down out and "
        "flatters the sparse methods; “both ways” is what crosses. Means over seeds that reached "
        "the target, but for the final accuracy, of all that are done."
    ]
    if has_state:
        notes.append(
            "Model state: BatchNorm statistics averaged over workers for the evaluations, "
            "counted apart."
        )
    caption = "The honest table: the same runs, with every byte that has to cross."
    return Table(f"table2-{name}-bytes", caption, columns, rows, notes)


# Figures of runs ----------------------------------------------------------------------------------


def _figure2(results: Results, names: Sequence[str], files: pathlib.Path) -> Section:
    section = Section("figure2", "Figure 2: accuracy and loss against uploads")
    section.paragraphs.append(_HOW_CURVES_ARE_DRAWN)
    for name in names:
        groups = results.standard_groups(name)
        if groups:
            section.figures.append(_curves(groups, f"figure2-{name}", files))
    if not all(results.standard_groups(name) for name in ("mnist_fc", "cifar10_narrow")):
        section.missing = _reproduce("figure2")
    return section


_HOW_CURVES_ARE_DRAWN = (
    "Lines are means over seeds of both uploads and accuracy (or loss) at the same round; bands go "
    "from the lowest seed to the highest. The dashed line is the target. Accuracy is on the whole "
    "test set; loss is the mean training loss since the evaluation before."
)


def _curves(groups: Sequence[Group], name: str, files: pathlib.Path) -> Figure:
    """Two panels, accuracy and loss, and their CSV."""
    label = _data_label(groups)
    who = ", ".join(findings.method_label(group.method) for group in groups)
    target = groups[0].config["target_accuracy"]
    panels = []
    for key, what in (("test_accuracy", "test accuracy"), ("train_loss", "training loss")):
        file = f"{name}-{what.split()[1]}.png"
        is_accuracy = key == "test_accuracy"
        bands = [_band(group, key) for group in groups]
        plot_bands(
            bands,
            files / file,
            title=label,
            x_label="uploads of all workers",
            y_label=what,
            y_scale="linear" if is_accuracy else "log",
            accuracies=accuracy_range(bands, target) if is_accuracy else None,
            target=target if is_accuracy else None,
        )
        alt = f"{label}: {what} against uploads for {who}; mean and range over seeds."
        panels.append(read_panel(files / file, alt))
    _write_curves(files / f"{name}.csv", groups)
    counts = {len(group.records) for group in groups}
    seeds = "–".join(str(count) for count in sorted({min(counts), max(counts)}))
    caption = f"{label}, {seeds} seed{'' if counts == {1} else 's'} for each method."
    return Figure(name, caption, panels)


def _band(group: Group, key: str, note: str = "") -> Band:
    """Of one field of the curve over seeds, against the mean of uploads at the same round."""
    points = _points(group)
    values = [[point[key] for point in at_round] for at_round in points]
    return Band(
        method=group.method,
        x=[_mean([point["uploads"] for point in at_round]) for at_round in points],
        mean=[_mean(of_seeds) for of_seeds in values],
        low=[min(of_seeds) for of_seeds in values],
        high=[max(of_seeds) for of_seeds in values],
        note=note,
    )


def _points(group: Group) -> list[tuple[dict[str, Any], ...]]:
    """For each evaluation, the points of all seeds."""
    return list(zip(*(run.curve for run in group.runs), strict=True))


def _write_curves(path: pathlib.Path, groups: Sequence[Group]) -> None:
    keys = ("uploads", "test_accuracy", "train_loss")
    statistics = (("mean", _mean), ("min", min), ("max", max))
    rows = []
    for group in groups:
        for at_round in _points(group):
            cells = [
                take([point[key] for point in at_round]) for key in keys for _, take in statistics
            ]
            density = "" if group.density is None else group.density
            rows.append([group.method, density, len(at_round), at_round[0]["iteration"], *cells])
    header = [f"{key} {name}" for key in keys for name, _ in statistics]
    write_csv(path, ["method", "density", "seeds", "round", *header], rows)


def _figure4(results: Results, files: pathlib.Path) -> Section:
    section = Section("figure4", "Figure 4: densities")
    groups = results.groups("mnist_fc", ("sparse", "sasg"))
    densities = sorted({group.density for group in groups if group.density is not None})
    if "figure4" in findings.not_run(results) or len(densities) < 2:
        section.missing = _reproduce("figure4")
    if not groups:
        return section
    section.paragraphs += [verdict.sentence for verdict in findings.density_verdicts(results)]
    label, target = _data_label(groups), groups[0].config["target_accuracy"]
    all_bands = [_band(group, "test_accuracy") for group in groups]
    panels = []
    for density in densities:
        file, here = f"figure4-density{density:g}.png", f"{100 * density:g}\u00a0%"
        plot_bands(
            [
                band
                for group, band in zip(groups, all_bands, strict=True)
                if group.density == density
            ],
            files / file,
            title=f"{label}, density {here}",
            x_label="uploads of all workers",
            y_label="test accuracy",
            accuracies=accuracy_range(all_bands, target),
            target=target,
        )
        alt = f"{label}, density {here}: test accuracy against uploads for Sparse and SASG."
        panels.append(read_panel(files / file, alt))
    _write_curves(files / "figure4.csv", groups)
    caption = f"{label}: test accuracy against uploads at each density, a mean and range of seeds."
    section.figures.append(Figure("figure4", caption, panels))
    section.figures += _uploads_by_density(groups, files)
    section.tables.append(_density_table(groups))
    return section


def _uploads_by_density(groups: Sequence[Group], files: pathlib.Path) -> list[Figure]:
    """Uploads to the target against density; nothing where no run reached it."""
    bands, rows = [], []
    for method in ("sparse", "sasg"):
        reached = [group for group in groups if group.method == method and group.reached]
        counts = [[record["uploads_at_target"] for record in g.reached] for g in reached]
        if not reached:
            continue
        bands.append(
            Band(
                method,
                x=[group.density or 1.0 for group in reached],
                mean=[_mean(of_seeds) for of_seeds in counts],
                low=[min(of_seeds) for of_seeds in counts],
                high=[max(of_seeds) for of_seeds in counts],
            )
        )
        rows += [
            [method, g.density, len(of_seeds), _mean(of_seeds), min(of_seeds), max(of_seeds)]
            for g, of_seeds in zip(reached, counts, strict=True)
        ]
    if not bands:
        return []
    name, label = "figure4-uploads", _data_label(groups)
    target = percent(groups[0].config["target_accuracy"], 0)
    plot_bands(
        bands,
        files / f"{name}.png",
        title=f"{label}, uploads to {target}",
        x_label="density",
        y_label="uploads of all workers",
        x_scale="log",
        x_ticks={x: f"{100 * x:g} %" for band in bands for x in band.x},
        marker="o",
    )
    header = ["method", "density", "seeds at target", "uploads mean", "min", "max"]
    write_csv(files / f"{name}.csv", header, rows)
    alt = f"{label}: uploads to {target} against density for Sparse and SASG."
    panel = read_panel(files / f"{name}.png", alt)
    return [Figure(name, f"{label}: uploads to {target} against density.", [panel])]


def _density_table(groups: Sequence[Group]) -> Table:
    columns = [
        *text_columns("density and method"),
        *number_columns("seeds at target", "uploads to the target", "rounds", "final accuracy"),
    ]
    rows = [
        [
            Cell(f"{100 * (g.density or 1.0):g}\u00a0%, {findings.method_label(g.method)}"),
            _reached(g),
            _mean_sd(g.at_target("uploads")),
            _mean_sd(g.at_target("iterations")),
            _mean_sd(g.in_the_end("final_test_accuracy"), _accuracy),
        ]
        for g in groups
    ]
    notes = [
        "Means ± sample standard deviations; the paper’s numbers for this figure are not at hand."
    ]
    return Table("figure4-table", "What each density took.", columns, rows, notes)


def _figure5(results: Results, files: pathlib.Path) -> Section:
    section = Section("figure5", "Figure 5: workers with different data sets")
    groups = results.standard_groups("hetero_narrow")
    if "figure5" in findings.not_run(results):
        section.missing = _reproduce("figure5")
    if groups:
        section.paragraphs = [
            f"Even workers hold one data set and odd workers the other. {_describe(groups)}",
            findings.heterogeneity_verdict(results).sentence,
            _HOW_CURVES_ARE_DRAWN,
        ]
        section.figures.append(_curves(groups, "figure5", files))
        section.tables.append(_honest_table(groups, "hetero_narrow"))
    return section


# Measurements -------------------------------------------------------------------------------------


def _communication(results: Results, files: pathlib.Path) -> Section:
    section = Section("figure3", "Figure 3 and Table III: time of communication")
    measurements = results.measurements
    if not measurements or results.wire is None:
        section.missing = _reproduce("table3")
        return section
    setting, network = results.wire["setting"], _network(results.wire["network"])
    part = percent(setting["upload_fraction"], 0)
    width = "" if setting["width"] is None else f" of width {setting['width']}"
    section.paragraphs = [
        f"{measurements[0].hosts} hosts with one worker each, {network}; messages of "
        f"{setting['config']}{width}"
        + ("." if setting["compute"] else f", {part} of the workers uploading with LASG and SASG.")
        + " Times are medians of the exchange alone, on a machine that was shared: the ratios say "
        "more than the times.",
        findings.communication_verdict(measurements).sentence,
    ]
    is_papers_model = setting["config"] == "cifar10_resnet18" and setting["width"] in (None, 64)
    base = findings.fastest_exchanges(measurements).get("sgd")
    papers = paper.COMMUNICATION_SECONDS
    rows = []
    for found in measurements:
        ratio = Cell("–")
        papers_ratio, off, papers_memory = Cell(_ABSENT), Cell("–"), Cell(_ABSENT)
        if base is not None:
            value = found.communication_ms / base.communication_ms
            ratio = Cell("1" if found is base else share(value), value)
            if found.method in papers:
                of_sgd = papers[found.method] / papers["sgd"]
                papers_ratio = Cell("1" if found.method == "sgd" else share(of_sgd), of_sgd)
                off = Cell("–") if found is base else _deviation(Spread(value, None), of_sgd)
        if is_papers_model and found.method in paper.SERVER_MEGABYTES:
            megabytes = paper.SERVER_MEGABYTES[found.method]
            papers_memory = Cell(f"{megabytes:g} MB", 1e6 * megabytes)
        rows.append(
            [
                Cell(f"{findings.method_label(found.method)}, {found.exchange}"),
                Cell(f"{found.uploads_per_round:.1f}", found.uploads_per_round),
                Cell(f"{found.communication_ms:,.0f} ms", found.communication_ms),
                ratio,
                papers_ratio,
                off,
                Cell(format_bytes(found.server_state_bytes), found.server_state_bytes),
                papers_memory,
            ]
        )
    time, memory = "time, of SGD’s", "server’s memory"
    columns = [
        *text_columns("method and exchange"),
        *number_columns("uploads a round", "exchange"),
        *number_columns("ours", "paper", "deviation", group=time),
        *number_columns("ours", "paper", group=memory),
    ]
    seconds = ", ".join(f"{findings.method_label(m)} {s:.2f} s" for m, s in papers.items())
    notes = [
        f"The paper’s times for a whole run: {seconds}. Ours are beside SGD’s over "
        f"{base.exchange if base else 'nothing yet'}; the paper’s network and exchange are not "
        "ours, so a deviation is no error by itself.",
        "Server’s memory: ours with values, indices and step history, in powers of ten; the "
        "paper’s with values alone"
        + ("." if is_papers_model else ", for another model than this one, so it is left out."),
    ]
    caption = "Time of the exchange in a round, the paper’s ratios beside ours."
    section.tables.append(Table("table3", caption, columns, rows, notes))
    plot_times(measurements, files / "figure3.png")
    write_csv(
        files / "figure3.csv",
        ["method", "exchange", "ms per round"],
        [[m.method, m.exchange, m.communication_ms] for m in measurements],
    )
    alt = "Bars on a logarithmic axis: time of the exchange for each method over each exchange."
    caption = f"Time of the exchange in a round, {network}; logarithmic."
    section.figures.append(Figure("figure3", caption, [read_panel(files / "figure3.png", alt)]))
    return section


def _network(text: str) -> str:
    """``1gbit links`` as ``1 Gbit/s links``."""
    return re.sub(r"\b(\d+)([kmg])bit\b", lambda m: f"{m[1]}\u00a0{m[2].upper()}bit/s", text)


def _theory(results: Results, files: pathlib.Path) -> Section:
    section = Section("theory", "Theory as numbers")
    if results.theory is None:
        section.missing = _reproduce("theory")
        return section
    found = results.theory["results"]
    section.paragraphs.append(findings.theory_verdict(results.theory).evidence)
    columns = [
        *text_columns("check", "problem and method", "quantity"),
        *number_columns("measured", "allowed"),
        *text_columns("verdict"),
        *number_columns("tolerance"),
        *text_columns("source"),
    ]
    rows = [
        [
            Cell(check["name"]),
            Cell(f"{check['problem']}, {findings.method_label(check['method'])}"),
            Cell(check["quantity"]),
            significant_cell(check["measured"]),
            Cell(f"{_RELATIONS[check['relation']]} {significant_cell(check['bound']).text}"),
            Cell("holds" if check["holds"] else "does not hold", is_outside=not check["holds"]),
            significant_cell(check["tolerance"]),
            Cell(check["source"]),
        ]
        for check in found["checks"]
    ]
    caption = "Measured numbers beside what the theory allows."
    section.tables.append(Table("theory-checks", caption, columns, rows))
    settings = _flat(found.get("settings", {}))
    if settings:
        rows = [[Cell(key), Cell(_plain(value))] for key, value in settings]
        columns = text_columns("setting", "value")
        caption = f"The settings ({len(rows)})"
        section.tables.append(Table("theory-settings", caption, columns, rows, folded=True))
    for key, variable, what in (("rate", "T", "rounds T"), ("workers", "M", "workers M")):
        if found[key]:
            section.figures.append(_rates(found[key], key, variable, what, files))
    return section


_RELATIONS = {"<=": "≤", ">=": "≥", "within": "="}


def _rates(
    lines: Sequence[Mapping[str, Any]],
    key: str,
    variable: str,
    what: str,
    files: pathlib.Path,
) -> Figure:
    """A panel for each problem, with every method's fitted slope."""
    name = f"theory-{key}"
    panels = []
    problems = list(dict.fromkeys(line["problem"] for line in lines))
    for number, problem in enumerate(problems, 1):
        bands = [
            Band(
                line["method"],
                *(line[field] for field in (variable, "mean", "min", "max")),
                note=f", slope {line['slope']:.2f}".replace("-", "−"),
            )
            for line in lines
            if line["problem"] == problem
        ]
        file = files / f"{name}-{number}.png"
        plot_bands(
            bands,
            file,
            title=problem,
            x_label=what,
            y_label="mean ‖∇F‖²",
            x_scale="log",
            y_scale="log",
            x_ticks={x: f"{x:,}" for x in bands[0].x},
            marker="o",
            slope=-0.5,
        )
        slopes = ", ".join(f"{findings.method_label(b.method)}{b.note[1:]}" for b in bands)
        alt = f"{problem}: averaged squared gradient norm against {what}; {slopes}."
        panels.append(read_panel(file, alt))
    rows = [
        [line["problem"], line["method"], *values, line["slope"]]
        for line in lines
        for values in zip(*(line[field] for field in (variable, "mean", "min", "max")), strict=True)
    ]
    header = ["problem", "method", variable, "mean", "min", "max", "slope"]
    write_csv(files / f"{name}.csv", header, rows)
    of = {"rate": "rounds (Theorem 1)", "workers": "number of workers (Remark 1)"}[key]
    caption = (
        f"Squared norm of the full gradient, averaged over a run, against the {of}; both axes "
        "logarithmic. Mean and range over seeds, fitted slopes, and the slope −1/2 dashed."
    )
    return Figure(name, caption, panels)


def _estimates(results: Results) -> Section:
    section = Section("estimates", "The full-width settings")
    if not results.estimates:
        section.missing = _reproduce("estimates")
        return section
    section.paragraphs.append(
        "The paper’s ResNet18 at its full width, run for a few rounds: what a whole run would take "
        "on the machine that timed it. The images’ content does not change that time. The paper’s "
        "cells for these settings are not at hand."
    )
    columns = [
        *text_columns("setting and method", "images"),
        *number_columns("parameters", "rounds made", "time a round", "rounds in all"),
        *number_columns("estimate for a run"),
        *text_columns("machine"),
    ]
    order = lambda e: (list(CONFIGS).index(e["config"]), list(METHODS).index(e["method"]))
    rows = [
        [
            Cell(f"{_dataset(CONFIGS[e['config']].dataset)}, {findings.method_label(e['method'])}"),
            Cell(e["dataset"]),
            count_cell(e["num_parameters"]),
            count_cell(e["rounds"]),
            Cell(f"{e['seconds_per_round']:.1f} s", e["seconds_per_round"]),
            count_cell(e["iterations"]),
            Cell(format_seconds(3600 * e["estimated_hours"]), e["estimated_hours"]),
            Cell(e["machine"]),
        ]
        for e in sorted(results.estimates, key=order)
    ]
    notes = ["In the CSV file, the estimate is in hours and the time of a round in seconds."]
    caption = "Estimates; none of these was run to the end."
    section.tables.append(Table("estimates", caption, columns, rows, notes))
    return section


# What was run, and what was not -------------------------------------------------------------------


def _not_run(results: Results) -> Section:
    section = Section("not-run", "What was not run")
    for target, names in findings.not_run(results).items():
        planned = len(RUNS[target])
        which = "" if len(names) == planned else f" ({', '.join(names)})"
        section.paragraphs.append(
            f"{target}: {len(names)} of {planned} planned runs are not done{which}. "
            f"{_reproduce(target)} makes them."
        )
    for run in results.runs:
        if run.record is None:
            made = run.curve[-1]["iteration"] if run.curve else 0
            section.paragraphs.append(
                f"Unfinished, and in no mean: {run.about['name']}, evaluated up to round {made:,} "
                f"of {run.about['config']['iterations']:,}."
            )
    done = {run.about["config"]["name"] for run in results.runs if run.record is not None}
    full = [name for name in CONFIGS if name.endswith("_resnet18") and name not in done]
    if full:
        section.paragraphs.append(
            f"The full-width settings {' and '.join(full)} were not run to the end, and the "
            "paper’s cells for them are not at hand."
        )
    section.paragraphs.append(
        "Nothing was run on other machines than those under “Environment and commands”."
    )
    return section


def _environment(results: Results) -> Section:
    section = Section("environment", "Environment and commands")
    sessions = [(run.about["name"], s) for run in results.runs for s in run.about["sessions"]]
    for name, found in (("communication", results.wire), ("theory", results.theory)):
        sessions += [(name, found)] if found else []
    sessions += [(f"estimate {e['config']}-{e['method']}", e) for e in results.estimates]
    places: dict[tuple[str, str], list[str]] = {}
    for name, found in sessions:
        versions = ", ".join(f"{k} {v}" for k, v in found["versions"].items())
        places.setdefault((found["machine"], versions), []).append(name)
    rows = [
        [Cell(machine), Cell(versions), count_cell(len(set(names)))]
        for (machine, versions), names in places.items()
    ]
    columns = [*text_columns("machine", "versions"), *number_columns("runs and measurements")]
    caption = "Where it was made, and with what."
    section.tables.append(Table("environment", caption, columns, rows))
    section.tables.append(_runs_table(results.runs))
    other = [
        (name, found) for name, found in sessions if "command" in found and "round" not in found
    ]
    if other:
        columns = text_columns("measurement", "started", "command")
        rows = [
            [Cell(name), Cell(found.get("started", "")), Cell(found["command"])]
            for name, found in other
        ]
        caption = f"The command of each measurement ({len(rows)})"
        section.tables.append(Table("measurements", caption, columns, rows, folded=True))
    section.tables = [table for table in section.tables if table.rows]
    return section


def _runs_table(runs: Sequence[Run]) -> Table:
    columns = [
        *text_columns("run"),
        *number_columns("seed", "rounds", "resumed"),
        *text_columns("sessions began at round", "started"),
        *number_columns("training"),
        *text_columns("command"),
    ]
    rows = []
    for run in runs:
        about, sessions = run.about, run.about["sessions"]
        made = run.curve[-1]["iteration"] if run.curve else 0
        seconds = run.record["compute_seconds"] if run.record else None
        times = max(0, len(sessions) - 1)
        rows.append(
            [
                Cell(about["name"]),
                Cell(str(about["seed"]), about["seed"]),
                Cell(f"{made:,} of {about['config']['iterations']:,}", made),
                Cell(f"{times} time{'' if times == 1 else 's'}", times),
                Cell(", ".join(f"{session['round']:,}" for session in sessions)),
                Cell(sessions[0]["started"].replace("T", " ") if sessions else "–"),
                Cell("unfinished") if seconds is None else Cell(format_seconds(seconds), seconds),
                Cell("; ".join(dict.fromkeys(session["command"] for session in sessions))),
            ]
        )
    notes = [
        "A run that was stopped goes on in a new session, from its last checkpoint. Training is "
        "without compilation and evaluation; in seconds in the CSV file."
    ]
    caption = f"The command, seed and sessions of each run ({len(rows)})"
    return Table("runs", caption, columns, rows, notes, folded=True)


# Words and cells ----------------------------------------------------------------------------------


def _reproduce(target: str) -> str:
    return f"python -m experiments reproduce {target} --out DIR"


_SETS = {
    "cifar100": "CIFAR-100",
    "cifar10": "CIFAR-10",
    "fashion_mnist": "Fashion-MNIST",
    "mnist": "MNIST",
    "digits": "scikit-learn’s digits",
}


def _data_label(groups: Sequence[Group], name: str = "") -> str:
    """The data set for people, and that the ResNet18 is a narrow one."""
    config = groups[0].config if groups else dataclasses.asdict(CONFIGS[name])
    dataset = groups[0].records[0]["dataset"] if groups else config["dataset"]
    is_narrow = config["model"] == "resnet18" and config["width"] < 64
    return _dataset(dataset) + (", narrow ResNet18" if is_narrow else "")


def _dataset(name: str) -> str:
    """``cifar10 (JPEG)`` as ``CIFAR-10 (JPEG)``."""
    return re.sub("|".join(_SETS), lambda match: _SETS[match[0]], name)


def _describe(groups: Sequence[Group]) -> str:
    """What was run, in a sentence."""
    config, record = groups[0].config, groups[0].records[0]
    network = (
        "fully connected, one hidden layer of" if config["model"] == "mlp" else "ResNet18 with"
    )
    unit = "units" if config["model"] == "mlp" else "channels in its first stage (64 in the paper)"
    seeds = sorted({record["seed"] for group in groups for record in group.records})
    adaptive = [group for group in groups if group.method in ("lasg", "sasg")]
    weights = ", ".join(
        f"{findings.method_label(group.method)} {group.config['alpha_c'][group.method]:g}"
        for group in adaptive
    )
    rule = f" The rule’s c (α = c·M/γ): {weights}." if weights else ""
    return (
        f"{_data_label(groups)}: {network} {config['width']} {unit}, "
        f"{record['num_parameters']:,} parameters; {config['num_workers']} workers of "
        f"{config['batch_size']} images, density {100 * config['density']:g}\u00a0%, "
        f"D = {config['history']}, {config['iterations']:,} rounds, learning rate "
        f"{config['learning_rate']:g} (the server averages).{rule} The target is a test "
        f"accuracy of {percent(config['target_accuracy'], 0)}; seed{'s' if len(seeds) > 1 else ''} "
        f"{', '.join(map(str, seeds))}."
    )


def _mean_sd(spread: Spread | None, text: Any = lambda x: f"{x:,.0f}") -> Cell:
    if spread is None:
        return Cell("not reached")
    sd = "" if spread.sd is None else f" ± {text(spread.sd)}"
    return Cell(f"{text(spread.mean)}{sd}", spread.mean)


def _bytes(spread: Spread | None) -> Cell:
    return Cell("–") if spread is None else Cell(format_bytes(spread.mean), spread.mean)


def _of_sgd(group: Group, sgd: Group | None, keys: tuple[str, ...]) -> Cell:
    ours, sgds = group.at_target(*keys), sgd.at_target(*keys) if sgd else None
    if ours is None or sgds is None:
        return Cell("–")
    ratio = ours.mean / sgds.mean
    return Cell("1" if group.method == "sgd" else share(ratio), ratio)


def _deviation(ours: Spread | None, papers: float, is_bound: bool = False) -> Cell:
    """In per cent; says so where it is outside of the tolerance and that matters."""
    if ours is None:
        return Cell("–")
    off = findings.deviation(ours.mean, papers)
    is_outside = is_bound and abs(off) > paper.UPLOADS_TOLERANCE
    return Cell(findings.signed_percent(off) + " outside" * is_outside, off, is_outside)


def _reached(group: Group) -> Cell:
    return Cell(f"{len(group.reached)} of {len(group.records)}", len(group.reached))


def _accuracy(value: float) -> str:
    return f"{100 * value:.2f}\u00a0%"


def _scientific(value: float) -> str:
    """``2.97e9``."""
    return f"{value:.2e}".replace("e+0", "e").replace("e+", "e")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Leaves of nested dictionaries with the names on the way to them."""
    leaves = []
    for key, value in tree.items():
        name = f"{prefix}{key}".replace("_", " ")
        leaves += _flat(value, f"{name}, ") if isinstance(value, Mapping) else [(name, value)]
    return leaves


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return "; ".join(map(_plain, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
