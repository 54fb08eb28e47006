"""The sections on measurements: communication, and theory."""

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.report import cells, page, paper
from experiments.report.cells import NOT_AT_HAND, NOTHING, method_label, percent, significant
from experiments.report.claims import Verdict
from experiments.report.figures import Band, plot_bands, plot_times
from experiments.report.findings import Results, fastest_exchanges
from experiments.report.page import Cell, Section, Table, number, text, words
from experiments.wire.measure import Measurement

# Communication ------------------------------------------------------------------------------------


def communication(results: Results, verdicts: Sequence[Verdict], files: pathlib.Path) -> Section:
    section = Section("figure3", "Figure 3 and Table III: time of communication")
    measurements = results.measurements
    if not measurements or results.wire is None:
        section.missing = cells.reproduce("table3")
        return section
    # ``1gbit links`` as ``1 Gbit/s links``.
    in_words = lambda match: f"{match[1]}\u00a0{match[2].upper()}bit/s"
    network = re.sub(r"\b(\d+)([kmg])bit\b", in_words, results.wire["network"])
    setting = results.wire["setting"]
    width = "" if setting["width"] is None else f" of width {setting['width']}"
    part = percent(setting["upload_fraction"], 0)
    uploading = f", {part} of the workers uploading with LASG and SASG"
    model = f"{setting['config']}{width}{'' if setting['compute'] else uploading}"
    hosts = measurements[0].hosts
    section.paragraphs = [
        words("figure3.setting", hosts=hosts, network=network, model=model),
        *(verdict.sentence for verdict in verdicts if verdict.where == "Table III"),
    ]
    section.tables.append(_times_table(measurements, setting))
    path = files / "figure3.png"
    plot_times(measurements, path)
    header = ["method", "exchange", "ms per round"]
    rows = [[m.method, m.exchange, m.communication_ms] for m in measurements]
    page.write_csv(path.with_suffix(".csv"), header, rows)
    caption = words("figure3.caption", network=network)
    panels = [page.Panel(path, words("figure3.alt"))]
    section.figures.append(page.Figure("figure3", caption, panels))
    return section


def _times_table(measurements: Sequence[Measurement], setting: Mapping[str, Any]) -> Table:
    is_papers_model = setting["config"] == "cifar10_resnet18" and setting["width"] in (None, 64)
    base: Any = fastest_exchanges(measurements).get("sgd")
    papers = paper.COMMUNICATION_SECONDS
    ratio = lambda m: m.communication_ms / base.communication_ms
    of_sgd = lambda m: papers[m.method] / papers["sgd"]
    in_paper = lambda m: base is not None and m.method in papers
    ours = lambda m: cells.share_cell(ratio(m), m is base) if base else NOTHING
    papers_share = lambda m: (
        cells.share_cell(of_sgd(m), m.method == "sgd") if in_paper(m) else NOT_AT_HAND
    )
    deviation = lambda m: (
        cells.deviation(ratio(m), of_sgd(m)) if in_paper(m) and m is not base else NOTHING
    )

    def papers_memory(found: Measurement) -> Cell | str:
        if not is_papers_model or found.method not in paper.SERVER_MEGABYTES:
            return NOT_AT_HAND
        megabytes = paper.SERVER_MEGABYTES[found.method]
        return Cell(f"{megabytes:g} MB", 1e6 * megabytes)

    uploads = lambda m: Cell(f"{m.uploads_per_round:.1f}", m.uploads_per_round)
    time, memory = "time, of SGD’s", "server’s memory"
    columns = [
        text("method and exchange", lambda m: f"{method_label(m.method)}, {m.exchange}"),
        number("uploads a round", uploads),
        number("exchange", lambda m: Cell(f"{m.communication_ms:,.0f} ms", m.communication_ms)),
        number("ours", ours, time),
        number("paper", papers_share, time),
        number("deviation", deviation, time),
        number("ours", lambda m: cells.bytes_cell(m.server_state_bytes), memory),
        number("paper", papers_memory, memory),
    ]
    seconds = ", ".join(f"{method_label(m)} {s:.2f} s" for m, s in papers.items())
    left_out = "" if is_papers_model else ", for another model than this one, so it is left out"
    notes = [
        words("table3.times", seconds=seconds, base=base.exchange if base else "nothing yet"),
        words("table3.memory", left_out=left_out),
    ]
    return Table("table3", columns, measurements, notes)


# Theory -------------------------------------------------------------------------------------------


def theory(results: Results, verdicts: Sequence[Verdict], files: pathlib.Path) -> Section:
    section = Section("theory", "Theory as numbers")
    if results.theory is None:
        section.missing = cells.reproduce("theory")
        return section
    found = results.theory["results"]
    section.paragraphs += [v.evidence for v in verdicts if v.where == "Theory"]
    relations = {"<=": "≤", ">=": "≥", "within": "="}
    allowed = lambda check: f"{relations[check['relation']]} {significant(check['bound']).text}"
    verdict = lambda check: Cell(
        "holds" if check["holds"] else "does not hold", is_outside=not check["holds"]
    )
    columns = [
        text("check", lambda check: check["name"]),
        text("problem and method", lambda c: f"{c['problem']}, {method_label(c['method'])}"),
        text("quantity", lambda check: check["quantity"]),
        number("measured", lambda check: significant(check["measured"])),
        number("allowed", allowed),
        text("verdict", verdict),
        number("tolerance", lambda check: significant(check["tolerance"])),
        text("source", lambda check: check["source"]),
    ]
    section.tables.append(Table("theory-checks", columns, found["checks"]))
    for key, variable, what, of in (
        ("rate", "T", "rounds T", "rounds (Theorem 1)"),
        ("workers", "M", "workers M", "number of workers (Remark 1)"),
    ):
        if found[key]:
            caption = words("theory.curves", of=of)
            panels = _rates(found[key], variable, what, files / f"theory-{key}.csv")
            section.figures.append(page.Figure(f"theory-{key}", caption, panels))
    return section


def _rates(
    lines: Sequence[Mapping[str, Any]], variable: str, what: str, path: pathlib.Path
) -> list[page.Panel]:
    """A panel for each problem, with every method's fitted slope, and the CSV of all."""
    fields = (variable, "mean", "min", "max")
    panels = []
    for number_, problem in enumerate(dict.fromkeys(line["problem"] for line in lines), 1):
        bands = [
            Band(
                line["method"],
                *(line[field] for field in fields),
                note=f", slope {line['slope']:.2f}".replace("-", "−"),
            )
            for line in lines
            if line["problem"] == problem
        ]
        panel = path.with_name(f"{path.stem}-{number_}.png")
        plot_bands(
            bands,
            panel,
            title=problem,
            x_label=what,
            y_label="mean ‖∇F‖²",
            x_scale="log",
            y_scale="log",
            x_ticks={x: f"{x:,}" for x in bands[0].x},
            marker="o",
            slope=-0.5,
        )
        slopes = ", ".join(f"{method_label(b.method)}{b.note[1:]}" for b in bands)
        alt = f"{problem}: averaged squared gradient norm against {what}; {slopes}."
        panels.append(page.Panel(panel, alt))
    rows = [
        [line["problem"], line["method"], *values, line["slope"]]
        for line in lines
        for values in zip(*(line[field] for field in fields), strict=True)
    ]
    page.write_csv(path, ["problem", "method", *fields, "slope"], rows)
    return panels
