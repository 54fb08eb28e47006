"""The results in the repository, and what README quotes of them."""

import dataclasses
import json
import math
import pathlib
import re

import pytest

from experiments.configs import CONFIGS, Config
from experiments.methods import METHODS, PAPER_METHODS, describe_setting
from experiments.report import findings, tuned
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
        # Fields that came later are as they were when there was no choice.
        standard = {field.name: field.default for field in dataclasses.fields(Config)}
        assert all(here[key] == standard[key] for key in here.keys() - there.keys())


def test_results_name_no_path_of_a_machine(results):
    for run in results.runs:
        for session in run.about["sessions"]:
            assert not re.search(r"\s/", session["command"])


def _readme_rows(name):
    return _rows_of(README, name)


def _rows_of(page, name):
    section = page.split(f"<!-- {name} -->")[1].split("<!-- end -->")[0]
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


@pytest.mark.parametrize("name", ["mnist_fc", "digits"])
def test_readme_quotes_what_each_method_takes_at_its_best(name):
    found = tuned.methods(tuned.read(RESULTS)[name])
    rows = _readme_rows(f"best-{name}")
    assert [row[0] for row in rows] == [METHODS[of.method].label for of in found]
    sgd = found[0]
    for (_, settings, rounds, gradients, uploads, up, both, accuracy), of in zip(
        rows, found, strict=True
    ):
        assert settings == ", ".join(describe_setting(*setting) for setting in of.best.items())

        def mean(*keys, of=of):
            spread = of.at_target(*keys)
            assert spread is not None
            return spread

        some = f" ({len(of.reached)} of {len(of.runs)})" * (len(of.reached) < len(of.runs))
        assert rounds == f"{mean('iterations').mean:,.0f}{some}"
        assert gradients == f"{mean('gradients_per_worker').mean:,.0f}"
        spread = mean("uploads")
        assert uploads == f"{spread.mean:,.0f} ± {spread.sd:,.0f}"
        for shown, keys in ((up, (tuned.UP,)), (both, (tuned.UP, tuned.DOWN))):
            ratio = mean(*keys, of=sgd).mean / mean(*keys).mean
            assert shown == f"{format_bytes(mean(*keys).mean)} (1/{ratio:,.1f})"
        assert of.accuracy is not None
        assert accuracy == f"{of.accuracy.mean:.2%}"


DOCS = (ROOT / "docs" / "silence.md").read_text()
SILENCE = json.loads((RESULTS / "silence" / "silence.json").read_text())


def test_the_page_on_silence_quotes_its_measurements():
    rows = _rows_of(DOCS, "noise")
    measured = {
        where: {(row["silence"], row["period"]): row["measured"] for row in SILENCE[where]}
        for where in ("quadratic", "mnist")
    }
    assert len(rows) == len(measured["mnist"])
    for silence, period, formula, quadratic, mnist in rows:
        key = silence, int(period)
        assert float(formula) == {"keep": 1}.get(silence, int(period))
        assert quadratic == f"{measured['quadratic'][key]:.2f}"
        assert mnist == f"{measured['mnist'][key]:.2f}"
    rows = _rows_of(DOCS, "rates")
    assert len(rows) == len(SILENCE["small_rates"])
    for row, (noise, rate, reuse, keep) in zip(SILENCE["small_rates"], rows, strict=True):
        assert (float(noise), float(rate)) == (row["noise"], row["rate"])
        shown = ["never" if row[key] is None else f"{row[key]:,}" for key in ("reuse", "keep")]
        assert [reuse, keep] == shown


@pytest.mark.parametrize(
    ("file", "seeds", "said"),
    [
        ("scale_free", 10, "never more than {} points below, for {} to {} % of the uploads"),
        ("mnist_fc", 1, "never more than {}, for {} to {} %. "),
    ],
)
def test_readme_says_how_the_rule_without_an_alpha_does(file, seeds, said):
    content = json.loads((RESULTS / "scale_free" / f"{file}.json").read_text())
    rows = content["tasks"]
    assert (len(rows), {row["seeds"] for row in rows}) == (12, {seeds})
    lost = max(100 * (row["always"] - row["rule"]) for row in rows)
    shares = sorted(100 * row["share"] for row in rows)
    shown = f"{math.ceil(100 * lost) / 100:.2f}", round(shares[0]), round(shares[-1])
    assert said.format(*shown) in " ".join(README.split())
    assert (lost < 0.3, shares[-1] <= 60) == (True, True)
    for row in content["sweep"]:
        assert row["always"] - row["rule"] < 0.017


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*/**/*.json")), ids=lambda path: path.stem)
def test_commands_name_no_path_of_a_machine(path):
    content = json.loads(path.read_text())
    command = content.get("command", "") if isinstance(content, dict) else ""
    assert not re.search(r"\s/", command)
