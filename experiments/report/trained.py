"""The sections on runs that trained: Table II, and figures 2, 4 and 5."""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.report import cells, claims, page, paper
from experiments.report.cells import NOTHING, at_target, data_label, percent
from experiments.report.claims import Verdict
from experiments.report.figures import Band, accuracy_range, plot_bands
from experiments.report.findings import Group, Results, Spread
from experiments.report.page import Cell, Section, Table, number, text, words


def table2(results: Results, name: str, verdicts: Sequence[Verdict]) -> Section:
    groups = results.standard_groups(name)
    section = Section(f"table2-{name}", f"Table II: {data_label(groups, name)}")
    if not groups:
        section.missing = f"python -m experiments compare {name}"
        if name in ("mnist_fc", "cifar10_narrow"):
            section.missing = cells.reproduce("table2")
        return section
    section.paragraphs.append(cells.describe(groups))
    failed = [v for v in verdicts if (v.where, v.status) == ("Table II, MNIST", claims.FAILS)]
    for verdict in failed if name == "mnist_fc" else []:
        says = {"claim": verdict.claim, "evidence": verdict.evidence}
        section.paragraphs.append(words("table2.fails", **says))
    section.tables = [_papers_table(groups, name), _honest_table(groups, name)]
    return section


def _papers_table(groups: Sequence[Group], name: str) -> Table:
    uploads, bits = "uploads to the target", "bits to the target"

    def beside(cell: Any, otherwise: str = NOTHING) -> Any:
        return lambda group: cell(group) if group.is_comparable else otherwise

    def off(key: str, papers: Any, *, is_bound: bool) -> Any:
        ours = lambda group: group.mean_at_target(key) if group.reached else None
        return beside(lambda g: cells.deviation(ours(g), papers(g.method), is_bound))

    papers_uploads, papers_bits = paper.MNIST_UPLOADS.__getitem__, paper.mnist_bits
    bits_cell = lambda value: Cell(cells.scientific(value), value)
    shown_uploads = beside(lambda g: cells.count(papers_uploads(g.method)), "not comparable")
    shown_bits = beside(lambda g: bits_cell(papers_bits(g.method)), "not comparable")
    logged = beside(lambda g: cells.mean_sd(Spread(*paper.AUTHORS_UPLOADS[g.method])))
    logged_mean = lambda method: paper.AUTHORS_UPLOADS[method][0]
    is_comparable = any(group.is_comparable for group in groups)
    logs = [
        number("authors’ logs", logged, uploads),
        number("deviation from logs", off("uploads", logged_mean, is_bound=False), uploads),
    ]
    columns = [
        text("method", lambda group: group.label),
        number("seeds at target", cells.reached),
        number("paper", shown_uploads, uploads),
        number("ours", at_target("uploads"), uploads),
        number("deviation", off("uploads", papers_uploads, is_bound=True), uploads),
        *(logs if is_comparable else []),
        number("paper", shown_bits, bits),
        number("ours", at_target("paper_uplink_bits", text=cells.scientific), bits),
        number("deviation", off("paper_uplink_bits", papers_bits, is_bound=True), bits),
    ]
    density, tolerance = percent(paper.DENSITY, 0), percent(paper.UPLOADS_TOLERANCE, 0)
    authors = words("table2-papers.authors", paper=paper, density=density, tolerance=tolerance)
    notes = [
        words("table2-papers.ours", every=groups[0].config["evaluate_every"]),
        authors if is_comparable else words("table2-papers.no-cell"),
    ]
    return Table(f"table2-{name}", columns, groups, notes, key="table2-papers")


def _honest_table(groups: Sequence[Group], name: str) -> Table:
    to_target, beside, whole = "to the target", "of SGD’s bytes", "whole run"
    up, down = "uplink_bytes", "downlink_bytes"
    sgd = next((group for group in groups if group.method == "sgd"), None)

    def moved(*keys: str) -> Any:
        size = lambda group: cells.bytes_cell(group.mean_at_target(*keys))
        return lambda group: size(group) if group.reached else NOTHING

    def of_sgd(*keys: str) -> Any:
        if sgd is None or not sgd.reached:
            return lambda group: NOTHING
        base = sgd.mean_at_target(*keys)
        ratio = lambda group: cells.share_cell(group.mean_at_target(*keys) / base, group is sgd)
        return lambda group: ratio(group) if group.reached else NOTHING

    state = lambda group: cells.bytes_cell(group.in_the_end("model_state_bytes").mean)
    has_state = any(record["model_state_bytes"] for g in groups for record in g.records)
    columns = [
        text("method", lambda group: group.label),
        number("rounds", at_target("iterations"), to_target),
        number("uploads", at_target("uploads"), to_target),
        number("up", moved(up), to_target),
        number("down", moved(down), to_target),
        number("both ways", moved(up, down), to_target),
        number("both ways", of_sgd(up, down), beside),
        number("up only", of_sgd(up), beside),
        *([number("model state", state, whole)] if has_state else []),
        number("final accuracy", cells.final_accuracy, whole),
    ]
    notes = [words("table2-bytes.up-and-down")]
    notes += [words("table2-bytes.model-state")] if has_state else []
    return Table(f"table2-{name}-bytes", columns, groups, notes, key="table2-bytes")


def figure2(results: Results, names: Sequence[str], files: pathlib.Path) -> Section:
    section = Section("figure2", "Figure 2: accuracy and loss against uploads")
    section.paragraphs.append(words("curves.how-they-are-drawn"))
    for name in names:
        groups = results.standard_groups(name)
        if groups:
            section.figures.append(_curves(groups, f"figure2-{name}", files))
    if not all(results.standard_groups(name) for name in ("mnist_fc", "cifar10_narrow")):
        section.missing = cells.reproduce("figure2")
    return section


def figure4(results: Results, verdicts: Sequence[Verdict], files: pathlib.Path) -> Section:
    section = Section("figure4", "Figure 4: densities")
    groups = results.groups("mnist_fc", ("sparse", "sasg"))
    densities = sorted({group.density for group in groups if group.density is not None})
    if "figure4" in results.not_run or len(densities) < 2:
        section.missing = cells.reproduce("figure4")
    if not groups:
        return section
    section.paragraphs += [v.sentence for v in verdicts if v.where == "Figure 4"]
    label, target = data_label(groups), groups[0].config["target_accuracy"]
    bands = {id(group): _band(group, "test_accuracy") for group in groups}
    panels = []
    for density in densities:
        path, here = files / f"figure4-density{density:g}.png", cells.density_label(density)
        plot_bands(
            [bands[id(group)] for group in groups if group.density == density],
            path,
            title=f"{label}, density {here}",
            x_label="uploads of all workers",
            y_label="test accuracy",
            accuracies=accuracy_range(list(bands.values()), target),
            target=target,
        )
        alt = f"{label}, density {here}: test accuracy against uploads for Sparse and SASG."
        panels.append(page.Panel(path, alt))
    _write_curves(files / "figure4.csv", groups)
    section.figures.append(page.Figure("figure4", words("figure4.caption", label=label), panels))
    columns = [
        text("density and method", lambda g: f"{cells.density_label(g.density)}, {g.label}"),
        number("seeds at target", cells.reached),
        number("uploads to the target", at_target("uploads")),
        number("rounds", at_target("iterations")),
        number("final accuracy", cells.final_accuracy),
    ]
    notes = [words("figure4-table.note")]
    section.tables.append(Table("figure4-table", columns, groups, notes))
    return section


def figure5(results: Results, verdicts: Sequence[Verdict], files: pathlib.Path) -> Section:
    section = Section("figure5", "Figure 5: workers with different data sets")
    groups = results.standard_groups("hetero_narrow")
    if "figure5" in results.not_run:
        section.missing = cells.reproduce("figure5")
    if groups:
        section.paragraphs = [
            words("figure5.workers", setting=cells.describe(groups)),
            *(verdict.sentence for verdict in verdicts if verdict.where == "Figure 5"),
            words("curves.how-they-are-drawn"),
        ]
        section.figures.append(_curves(groups, "figure5", files))
        section.tables.append(_honest_table(groups, "hetero_narrow"))
    return section


def _curves(groups: Sequence[Group], name: str, files: pathlib.Path) -> page.Figure:
    """Two panels, accuracy and loss, and their CSV."""
    label, target = data_label(groups), groups[0].config["target_accuracy"]
    who = ", ".join(group.label for group in groups)
    panels = []
    for key, what in (("test_accuracy", "test accuracy"), ("train_loss", "training loss")):
        bands = [_band(group, key) for group in groups]
        is_accuracy = key == "test_accuracy"
        path = files / f"{name}-{what.split()[1]}.png"
        plot_bands(
            bands,
            path,
            title=label,
            x_label="uploads of all workers",
            y_label=what,
            y_scale="linear" if is_accuracy else "log",
            accuracies=accuracy_range(bands, target) if is_accuracy else None,
            target=target if is_accuracy else None,
        )
        alt = f"{label}: {what} against uploads for {who}; mean and range over seeds."
        panels.append(page.Panel(path, alt))
    _write_curves(files / f"{name}.csv", groups)
    counts = {len(group.records) for group in groups}
    seeds = "–".join(str(count) for count in sorted({min(counts), max(counts)}))
    caption = f"{label}, {seeds} seed{'' if counts == {1} else 's'} for each method."
    return page.Figure(name, caption, panels)


def _band(group: Group, key: str) -> Band:
    """Of one field of the curve over seeds, against the mean of uploads at the same round."""
    points = _points(group)
    uploads = [float(np.mean([point["uploads"] for point in at_round])) for at_round in points]
    values = [[point[key] for point in at_round] for at_round in points]
    return Band.over(group.method, uploads, values)


def _points(group: Group) -> list[tuple[dict[str, Any], ...]]:
    """For each evaluation, the points of all seeds."""
    return list(zip(*(run.curve for run in group.runs), strict=True))


def _write_curves(path: pathlib.Path, groups: Sequence[Group]) -> None:
    keys = ("uploads", "test_accuracy", "train_loss")
    statistics = {"mean": np.mean, "min": min, "max": max}
    rows = []
    for group in groups:
        for at_round in _points(group):
            values = [[point[key] for point in at_round] for key in keys]
            found = [take(of_key) for of_key in values for take in statistics.values()]
            density = "" if group.density is None else group.density
            rows.append([group.method, density, len(at_round), at_round[0]["iteration"], *found])
    header = [f"{key} {name}" for key in keys for name in statistics]
    page.write_csv(path, ["method", "density", "seeds", "round", *header], rows)
