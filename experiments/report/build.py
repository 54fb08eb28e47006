"""The command ``report``: one HTML page of a folder of results, and the PNG and CSV behind it."""

import datetime
import pathlib
from collections.abc import Sequence

from experiments.configs import CONFIGS
from experiments.report import cells, claims, findings, measured, paper, trained, tuned
from experiments.report.findings import Results, Run
from experiments.report.page import Cell, Section, Table, number, text, words, write_page
from experiments.report.tables import format_seconds
from experiments.studies.plan import RUNS


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
        *tuned.sections(directory, files),
        *(trained.table2(results, name, verdicts) for name in names),
        trained.figure2(results, names, files),
        measured.communication(results, verdicts, files),
        trained.figure4(results, verdicts, files),
        trained.figure5(results, verdicts, files),
        measured.theory(results, verdicts, files),
        _not_run(results),
        _environment(results),
    ]
    for table in (table for section in sections for table in section.tables):
        table.write(files)
    written = f"{datetime.datetime.now():%Y-%m-%d %H:%M}"
    done = sum(run.record is not None for run in results.runs)
    about = {"paper": paper, "written": written, "done": done}
    path = directory / "report.html"
    write_page(path, sections=sections, verdicts=verdicts, **about)
    return path


# What was not run, and where and how the rest was -------------------------------------------------


def _not_run(results: Results) -> Section:
    section = Section("not-run", "What was not run")
    for target, names in results.not_run.items():
        values = {"target": target, "count": len(names), "planned": len(RUNS[target])}
        which = "" if len(names) == len(RUNS[target]) else f" ({', '.join(names)})"
        command = cells.reproduce(target)
        section.paragraphs.append(words("not-run.planned", **values, which=which, command=command))
    for run in results.runs:
        if run.record is None:
            values = {"rounds": run.rounds, "iterations": run.about["config"]["iterations"]}
            section.paragraphs.append(words("not-run.unfinished", name=run.about["name"], **values))
    done = {run.about["config"]["name"] for run in results.runs if run.record is not None}
    full = [name for name in CONFIGS if name.endswith("_resnet18") and name not in done]
    if full:
        section.paragraphs.append(words("not-run.full-width", names=" and ".join(full)))
    section.paragraphs.append(words("not-run.elsewhere"))
    return section


def _environment(results: Results) -> Section:
    measured = [("communication", results.wire), ("theory", results.theory)]
    measured = [(name, found) for name, found in measured if found]
    sessions = [(run.about["name"], s) for run in results.runs for s in run.about["sessions"]]
    places: dict[tuple[str, str], set[str]] = {}
    for name, found in sessions + measured:
        versions = ", ".join(f"{k} {v}" for k, v in found["versions"].items())
        places.setdefault((found["machine"], versions), set()).add(name)
    of_place = [
        text("machine", lambda place: place[0]),
        text("versions", lambda place: place[1]),
        number("runs and measurements", lambda place: cells.count(len(places[place]))),
    ]
    of_measurement = [
        text("measurement", lambda item: item[0]),
        text("started", lambda item: item[1].get("started", "")),
        text("command", lambda item: item[1]["command"]),
    ]
    tables = [
        Table("environment", of_place, list(places)),
        _runs_table(results.runs),
        Table("measurements", of_measurement, measured, folded=True),
    ]
    section = Section("environment", "Environment and commands")
    section.tables = [table for table in tables if table.subjects]
    return section


def _runs_table(runs: Sequence[Run]) -> Table:
    sessions = lambda run: run.about["sessions"]

    def resumed(run: Run) -> Cell:
        times = max(0, len(sessions(run)) - 1)
        return Cell(f"{times} time{'' if times == 1 else 's'}", times)

    def training(run: Run) -> Cell | str:
        if run.record is None:
            return "unfinished"
        return Cell(format_seconds(run.record["compute_seconds"]), run.record["compute_seconds"])

    def started(run: Run) -> str:
        return sessions(run)[0]["started"].replace("T", " ") if sessions(run) else cells.NOTHING

    rounds = lambda run: f"{run.rounds:,} of {run.about['config']['iterations']:,}"
    columns = [
        text("run", lambda run: run.about["name"]),
        number("seed", lambda run: Cell(str(run.about["seed"]), run.about["seed"])),
        number("rounds", lambda run: Cell(rounds(run), run.rounds)),
        number("resumed", resumed),
        text(
            "sessions began at round", lambda r: ", ".join(f"{s['round']:,}" for s in sessions(r))
        ),
        text("started", started),
        number("training", training),
        text("command", lambda r: "; ".join(dict.fromkeys(s["command"] for s in sessions(r)))),
    ]
    return Table("runs", columns, runs, [words("runs.resumed")], folded=True)
