"""The results in the repository, and what README quotes of them."""

import dataclasses
import json
import pathlib
import re

import pytest

from experiments.configs import CONFIGS
from experiments.methods import METHODS, PAPER_METHODS
from experiments.report import findings
from experiments.report.tables import format_bytes
from experiments.studies import bench
from experiments.training.records import Store, at_target
from experiments.wire import measure as wire

ROOT = pathlib.Path(findings.__file__).parents[2]
RESULTS = ROOT / "experiments" / "results"
README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def results():
    return findings.read(RESULTS)


def test_records_are_those_of_their_curves():
    store = Store(RESULTS)
    assert store.records() == [files.record() for files in store.runs()]  # all are done
    for files in store.runs():
        record, curve = files.record(), files.curve()
        assert record is not None
        assert record["iterations"] == curve[-1]["iteration"]
        assert record["uploads"] == curve[-1]["uploads"]
        assert record["final_test_accuracy"] == curve[-1]["test_accuracy"]
        found = at_target(curve, record["target_accuracy"])
        assert {key: record[key] for key in found} == found


def test_results_are_of_the_settings_that_the_code_has(results):
    for run in results.runs:
        there = run.about["config"]
        here = dataclasses.replace(CONFIGS[there["name"]], density=there["density"])
        here = json.loads(json.dumps(dataclasses.asdict(here)))
        assert there == {key: here[key] for key in there}
        assert not any(here[key] for key in here.keys() - there.keys())  # fields that came later


def test_results_name_no_path_of_a_machine(results):
    for run in results.runs:
        for session in run.about["sessions"]:
            assert not re.search(r"\s/", session["command"])


def _readme_rows(name):
    section = README.split(f"<!-- {name} -->")[1].split("<!-- end -->")[0]
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in section.splitlines()
        if line.startswith("| ")
    ][1:]


def test_readme_quotes_the_bench():
    rows = bench.read(RESULTS / "bench")
    quoted = _readme_rows("bench")
    assert [[what, case, note] for what, case, _, _, note in quoted] == [
        [row["part"], row["case"], row["note"]] for row in rows
    ]
    for (_, _, median, ratio, _), row in zip(quoted, rows, strict=True):
        assert ratio == f"{row['seconds'] / row['floor']:.2f}"
        number = float(median.removesuffix(" ms").replace(",", ""))
        assert number == pytest.approx(1000 * row["seconds"], rel=6e-3)


def test_readme_quotes_the_wire():
    content = json.loads((RESULTS / "wire" / "wire.json").read_text())
    measurements = [wire.Measurement(**measured) for measured in content["measurements"]]
    quoted = _readme_rows("wire")
    assert [(method, exchange) for method, exchange, *_ in quoted] == [
        (METHODS[m.method].label, f"`{m.exchange}`") for m in measurements
    ]
    dense = measurements[0].communication_ms
    for (_, _, *sizes, exchange, ratio), m in zip(quoted, measurements, strict=True):
        assert m.kernel_sent is not None
        assert m.kernel_received is not None
        by_host = m.ledger_sent, m.kernel_sent, m.ledger_received, m.kernel_received
        assert sizes == [format_bytes(m.of_a_worker(sizes)) for sizes in by_host]
        assert exchange == f"{m.communication_ms:,.0f} ms"
        value = 1 / float(ratio[2:]) if ratio.startswith("1/") else float(ratio)
        assert value == pytest.approx(m.communication_ms / dense, rel=0.02)


@pytest.mark.parametrize("name", ["mnist_fc", "cifar10_narrow"])
def test_readme_quotes_the_means(results, name):
    """Every row of README's table of this experiment is made of the records."""
    rows = _readme_rows(name)
    groups = {METHODS[group.method].label: group for group in results.standard_groups(name)}
    assert [row[0] for row in rows] == list(groups)
    assert groups.keys() >= {METHODS[method].label for method in PAPER_METHODS}
    for label, rounds, uploads, bits, up, both, accuracy in rows:
        group = groups[label]

        def mean(*keys, group=group):
            spread = group.at_target(*keys)
            assert spread is not None
            return spread.mean

        assert rounds == f"{mean('iterations'):,.0f}"
        assert uploads.split(" ± ")[0] == f"{mean('uploads'):,.0f}"
        assert bits == f"{mean('paper_uplink_bits'):.2e}"
        assert up == format_bytes(mean("uplink_bytes"))
        assert both.split(" (")[0] == format_bytes(mean("uplink_bytes", "downlink_bytes"))
        assert accuracy == f"{group.in_the_end('final_test_accuracy').mean:.2%}"
