"""The command ``report``: one HTML page of a folder of results, and the PNG and CSV behind it."""

import datetime
import pathlib

from experiments.report import claims, findings, measured, paper, provenance, trained
from experiments.report.page import write_page


def write_report(directory: pathlib.Path) -> pathlib.Path:
    """Writes ``report.html`` in a folder of results, and PNG and CSV files in ``report/``.

    Results may be partial: a section without any says which command makes them. Returns the path of
    the page; errors are those of :func:`experiments.report.findings.read`.
    """
    results = findings.read(directory)
    verdicts = claims.verdicts(results)
    files = directory / "report"
    files.mkdir(exist_ok=True)
    others = {run.about["config"]["name"] for run in results.runs}
    others -= {"mnist_fc", "cifar10_narrow", "hetero_narrow"}
    names = ["mnist_fc", "cifar10_narrow", *sorted(others)]
    sections = [
        *(trained.table2(results, name, verdicts) for name in names),
        trained.figure2(results, names, files),
        measured.communication(results, verdicts, files),
        trained.figure4(results, verdicts, files),
        trained.figure5(results, verdicts, files),
        measured.theory(results, verdicts, files),
        measured.estimates(results),
        provenance.not_run(results),
        provenance.environment(results),
    ]
    for table in (table for section in sections for table in section.tables):
        table.write(files)
    written = f"{datetime.datetime.now():%Y-%m-%d %H:%M}"
    done = sum(run.record is not None for run in results.runs)
    about = {"paper": paper, "written": written, "done": done}
    path = directory / "report.html"
    write_page(path, sections=sections, verdicts=verdicts, **about)
    return path
