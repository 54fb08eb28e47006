"""The results in the repository, and what README quotes of them."""

import dataclasses
import json
import math
import pathlib
import re
import statistics

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
        standard = {f.name: f.default for f in dataclasses.fields(Config)}
        standard["methods"] = list(CONFIGS["digits"].methods)
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


def test_readme_says_at_which_rates_of_adamw_digits_do_best():
    methods = json.loads((RESULTS / "scale_free" / "adamw_rates.json").read_text())["methods"]
    rates = [methods[name]["best"]["learning_rate"] for name in ("turn", "sparse")]
    runs = [methods[name]["runs"] for name in ("turn", "sparse")]
    ends = [f"{100 * statistics.mean(run['accuracy'] for run in of):.2f}" for of in runs]
    said = (
        "turns of 2 do best at {} and always sending at {}, where nine other seeds end at {} and {}"
    )
    assert f"{said.format(*rates, *ends)} %" in " ".join(README.split())


# In few bits --------------------------------------------------------------------------------------

FEW_BITS = " ".join(README.split("### In few bits")[1].split("\n### ")[0].split())


def _coded(name):
    return json.loads((RESULTS / "coded" / f"{name}.json").read_text())


def _both(outcome):
    """Megabytes both ways to the target."""
    return (outcome["uplink_bytes_at_target"] + outcome["downlink_bytes_at_target"]) / 1e6


def test_readme_quotes_coded_messages_at_the_papers_rate():
    rows, records = _readme_rows("coded"), _coded("paper_rate")["records"]
    methods = ("sasg_two_way", "sasg_coded")
    assert [row[0] for row in rows] == [METHODS[method].label for method in methods]
    means = {}
    for (_, rounds, uploads, both, accuracy), method in zip(rows, methods, strict=True):
        runs = [record for record in records if record["method"] == method]
        reached = [run for run in runs if run["uploads_at_target"] is not None]
        assert [run["seed"] for run in runs] == [run["seed"] for run in reached] == [1, 2, 3, 4, 5]
        keys = "iterations_at_target uploads_at_target two_way_bytes_at_target final_test_accuracy"
        mean = {key: statistics.mean(run[key] for run in reached) for key in keys.split()}
        means[method] = list(mean.values())
        assert rounds == f"{mean['iterations_at_target']:,.0f}"
        assert uploads == f"{mean['uploads_at_target']:,.0f}"
        assert both == format_bytes(mean["two_way_bytes_at_target"])
        assert accuracy == f"{mean['final_test_accuracy']:.2%}"
    plain, coded = means.values()
    assert coded[0] < 1.1 * plain[0]
    assert 6 * coded[2] < plain[2]
    assert abs(coded[3] - plain[3]) < 0.001


def test_readme_says_what_tuning_gains_coded_messages_of_rule_6():
    methods, said = _coded("tuned")["methods"], []
    for name in ("sasg_two_way", "sasg_coded"):
        of, label = methods[name], METHODS[name].label.replace(",", "")
        reached = [run for run in of["runs"] if run["uploads_at_target"] is not None]
        assert len(of["runs"]) == 5
        assert len(of["tried"]) == 6
        best = ", ".join(describe_setting(*setting) for setting in of["best"].items())
        said.append(f"the best of {label} ({best})")
        assert said[-1] in FEW_BITS
        assert len(reached) == {"sasg_two_way": 1, "sasg_coded": 0}[name]
    ends = [statistics.mean(run["accuracy"] for run in of["runs"]) for of in methods.values()]
    assert f"they end at {100 * ends[0]:.2f} and {ends[1]:.2%}".replace("%", " %") in FEW_BITS


@pytest.mark.parametrize(
    ("path", "times", "said"),
    [
        ("best/mnist_fc/best-4", 4, "**1/{ratio:,.0f} for {gradients:,.0f} gradients**"),
        ("coded/twice", 2, "**1/{ratio:,.0f} of its bytes both ways for {gradients:,.0f} gradi"),
    ],
)
def test_readme_says_what_coded_turns_save_beside_tuned_sgd(path, times, said):
    content = json.loads((RESULTS / f"{path}.json").read_text())
    runs = content["methods"]["local_coded"]["runs"]
    sgd = tuned.methods(tuned.read(RESULTS)["mnist_fc"])[0]
    base, bytes_of_sgd = sgd.at_target("iterations"), sgd.at_target(tuned.UP, tuned.DOWN)
    assert base is not None
    assert bytes_of_sgd is not None
    both = statistics.mean(map(_both, runs))  # all get there
    gradients = statistics.mean(run["gradients_per_worker_at_target"] for run in runs)
    assert len(runs) == 5
    assert gradients <= times * base.mean
    ratio = bytes_of_sgd.mean / both / 1e6
    assert ratio > {2: 1000, 4: 3000}[times]
    assert said.format(ratio=ratio, gradients=gradients) in FEW_BITS
    assert f"({both:.3g} MB" in FEW_BITS


def test_readme_says_what_of_it_is_worth_its_while():
    def tried(name, **setting):
        outcomes = _coded(name)["methods"]["local_coded"]["tried"]
        (found,) = [of for of in outcomes if setting.items() <= of.items()]
        return found

    gradients = lambda of: of["gradients_per_worker_at_target"]
    best = tried("values", values="sign")
    assert f"({gradients(best):,} gradients, {_both(best):.3g} MB)" in FEW_BITS
    four, sixteen = (tried("values", values=name) for name in ("sign4", "bfloat16"))
    assert gradients(best) == gradients(four) == gradients(sixteen)
    assert f"({_both(four):.1f} and {_both(sixteen):.1f} MB)" in FEW_BITS
    plain = tried("values", values="plain")
    assert f"({gradients(plain):,}, {_both(plain):.1f} MB)" in FEW_BITS
    turns = [tried("down", down_rule="every", down_period=period) for period in (2, 4)]
    assert f"the turn of 2 ({_both(turns[0]):.3g} MB)" in FEW_BITS
    assert gradients(turns[0]) == gradients(turns[1])
    for rule in ("direction_change", "residual_norm", "message_share"):
        found = tried("down", down_rule=rule, down_period=4)
        assert f"`{rule}` takes {gradients(found):,} grad" in FEW_BITS or (
            f"`{rule}` {gradients(found):,}" in FEW_BITS
        )
    same = {"learning_rate": 0.2, "local_steps": 2, "density": 0.003, "period": 4}
    smaller = tried("sweep", down_density=0.001, **same)
    assert f"takes {_both(smaller):.1f} MB" in FEW_BITS
    for decay in (0.99, 0.9):
        lost = tried("decay", residual_decay=decay)
        assert gradients(lost) is None
        assert f"{lost['accuracy']:.1%} with {decay}".replace("%", " %") in FEW_BITS
    small, large = (tried("batch", batch_size=size) for size in (5, 20))
    assert gradients(small) is None
    assert f"batches of 5 ({small['accuracy']:.1%})".replace("%", " %") in FEW_BITS
    assert f"of 20 take {gradients(large):,} gradients and {_both(large):.0f} MB" in FEW_BITS
    whole, half = (tried("momentum", outer_rate=rate, outer_momentum=0.5) for rate in (1.0, 0.5))
    none = [tried("momentum", outer_rate=rate, outer_momentum=0.8) for rate in (1.0, 0.5)]
    inside = tried("momentum_inner", learning_rate=0.02)
    takes = (
        f"takes {gradients(whole):,} gradients, at half the rate {gradients(half):,}, and of 0.8"
    )
    assert f"{takes} never gets there" in FEW_BITS
    assert [gradients(of) for of in none] == [None, None]
    assert f"of 0.9 at a tenth of the rate, {gradients(inside):,}." in FEW_BITS
    sweep = _coded("sweep")["methods"]["local_coded"]
    least = min((of for of in sweep["tried"] if gradients(of)), key=_both)
    assert len(sweep["tried"]) == 48
    assert least["local_steps"] == 4
    assert f"four steps, {_both(least):.1f} MB, takes {gradients(least):,} grad" in FEW_BITS
    assert [gradients(run) is None for run in sweep["runs"]].count(True) == 1


def test_readme_says_how_fast_coded_exchanges_are():
    content = _coded("wire")
    faster = {}
    for rate in ("1gbit", "100mbit"):
        times = {}
        for name in ("plain4", "coded4", "two_way4"):
            for m in content[f"{rate}-{name}"]["measurements"]:
                is_coded = name == "coded4" or m["method"] == "sasg_coded"
                method = "two_way" if name == "two_way4" else m["method"]
                times.setdefault((method, m["exchange"]), {})[is_coded] = m["communication_ms"]
                sent = sum(m["ledger_sent"]) + sum(m["ledger_received"])
                kernel = sum(m["kernel_sent"]) + sum(m["kernel_received"])
                if rate == "1gbit" and not (is_coded and m["exchange"] == "sharded"):  # 33 kB each
                    assert sent < kernel < 1.01 * sent
        assert len(times) == 8
        ratios = [time[False] / time[True] for time in times.values()]
        faster[rate] = min(ratios), max(ratios)
    low, high = faster["100mbit"]
    assert low > 3
    assert f"at 100 Mbit/s {low:.1f} to {high:.1f} times as fast" in FEW_BITS
    low, high = faster["1gbit"]
    assert low > 1
    assert f"at 1 Gbit/s {low:.1f} to {high:.1f} times" in FEW_BITS


def test_readme_says_what_coding_takes():
    rows = {row["case"]: row["ratio"] for row in _coded("bench")["rows"]}
    names = ["sort", *(f"{x}, {y}" for x in ("elias_fano", "sign") for y in ("encode", "decode"))]
    assert f"takes {sum(rows[name] for name in names):.2f} of the time" in FEW_BITS
    assert f"round of `mnist_fc` {rows['SASG, coded']:.2f} times the uncoded" in FEW_BITS
    small = [row for row in _coded("coding")["indices"] if row["size"] == 407_050]
    (row,) = [row for row in small if row["density"] == 0.01]
    assert f"(entropy {row['entropy']:.2f})" in README
    assert f'| `"elias_fano"` | {row["elias_fano"]:.2f} |' in README
    assert f'| `"tiled"` | {row["tiled"]:.1f} |' in README


def test_readme_says_what_coding_does_to_whole_rounds():
    times = {
        name: {m["exchange"]: m["round_ms"] for m in content["measurements"]}
        for name, content in _coded("rounds").items()
    }
    ratios = [times["coded"][name] / times["plain"][name] for name in ("gather", "server")]
    said = f"takes {ratios[0]:.2f} times as long coded as not over `gather`, {ratios[1]:.2f} over"
    assert said in FEW_BITS


# A language model ---------------------------------------------------------------------------------

LANGUAGE = " ".join(README.split("### A language model")[1].split("\n### ")[0].split())


def _label(record):
    if record["method"] != "local_coded":
        label = METHODS[record["method"]].label
        return label if record["inner"] is None else f"{label}, AdamW inside"
    inner = {"muon": "Muon", "adamw": "AdamW"}[record["inner"]]
    return f"coded, {inner} inside, {100 * record['density']:g} %"


def test_readme_quotes_the_first_runs_of_a_language_model():
    records = json.loads((RESULTS / "language" / "first.json").read_text())
    assert {record["seed"] for record in records} == {1}
    assert {record["gradients_per_worker"] for record in records} == {1500}
    best = {}  # of each label
    for record in sorted(records, key=lambda record: -record["final_bits_per_byte"]):
        best[_label(record)] = record
    dense = best["AdamW"]["two_way_bytes"]
    rows = _readme_rows("language")
    assert {row[0] for row in rows} == best.keys()
    for label, rate, rounds, both, bits in rows:
        record = best[label]
        assert rate == f"{record['learning_rate']:g}"
        assert rounds == f"{record['iterations']:,}"
        ratio = f"(1/{dense / record['two_way_bytes']:,.0f})"
        assert both == f"{format_bytes(record['two_way_bytes'])} {ratio}"
        assert bits == f"{record['final_bits_per_byte']:.3f}"
    for label, rates in (("AdamW", (0.001, 0.002, 0.004, 0.008)), (_FOUR, (0.004, 0.008))):
        tried = {
            r["learning_rate"]: r["final_bits_per_byte"] for r in records if _label(r) == label
        }
        assert tuple(tried[rate] for rate in sorted(tried)) == tuple(tried[rate] for rate in rates)
        assert f"({', '.join(f'{tried[rate]:.3f}' for rate in rates)})" in LANGUAGE
    bits = {label: record["final_bits_per_byte"] for label, record in best.items()}
    assert bits[_TEN] < bits["AdamW"]
    assert f"better by {bits['AdamW'] - bits['Muon']:.2f} where" in LANGUAGE
    assert f"coding cost {bits[_TEN] - bits['Muon']:.2f} of it" in LANGUAGE
    assert f"inside they cost {bits[_TEN.replace('Muon', 'AdamW')] - bits['AdamW']:.2f}" in LANGUAGE
    assert bits["coded, Muon inside, 0.8 %"] > bits["SparseLoCo, AdamW inside"]


_FOUR, _TEN = "coded, Muon inside, 4 %", "coded, Muon inside, 10 %"
