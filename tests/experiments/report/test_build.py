"""The page says what the runs say: cells, deviations and verdicts, also where they are bad news."""

import csv
import dataclasses
import json
import math

import pytest

from experiments.configs import CONFIGS
from experiments.report import claims, trained
from experiments.report.build import write_report
from experiments.report.figures import plot_bands
from experiments.studies.plan import RUNS
from experiments.training.records import ResultsError


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# Table II -----------------------------------------------------------------------------------------


def test_the_papers_cells_stand_beside_ours_with_their_deviation(page):
    sd = f"{math.sqrt(2.5e6):,.0f}"  # of 21,000, 22,000, ..., 25,000
    assert page.row("table2-mnist_fc", "SASG") == [
        "5 of 5",
        "22,823",
        f"23,000 ± {sd}",
        "+0.8 %",
        "23,775 ± 1,910",
        "−3.3 %",
        "2.97e9",
        "3.00e9 ± 2.06e8",
        "+0.8 %",
    ]
    assert page.row("table2-mnist_fc", "SGD")[:5] == [
        "5 of 5",
        "60,400",
        f"61,000 ± {sd}",
        "+1.0 %",
        "61,000 ± 5,550",
    ]
    assert page.row("table2-mnist_fc", "SGD")[6] == "7.87e11"  # 60,400 · 32 · 407,050
    assert page.row("table2-mnist_fc", "Sparse")[3] == "−8.0 %"


def test_the_honest_table_counts_both_ways(full, page):
    # 6,000 rounds of 10 workers · 4 bytes · 407,050 down: 97.7 GB. Up, 6 bytes an entry: SGD's
    # 61,000 uploads are 149 GB and SASG's 23,000 are 562 MB, so 1/265.2 up and 1/2.5 both ways.
    row = page.row("table2-mnist_fc", "SASG", table=1)
    assert row[0] == "6,000 ± 0"
    assert row[2:7] == ["562 MB", "97.7 GB", "98.3 GB", "1/2.5", "1/265.2"]
    assert row[7] == "98.30 % ± 0.16 %"
    assert page.row("table2-mnist_fc", "SGD", table=1)[5:7] == ["1", "1"]
    status, evidence = full.verdict("Table II, MNIST: what is left")
    assert status == claims.NOTE
    assert "1/265.2 of its bytes up with indices and flags, and 1/2.5 of its bytes both" in evidence
    assert evidence.endswith("With a sparse way down it moves 1/2.5.")


def test_csv_files_hold_the_numbers_unrounded(full):
    rows = {
        row["method"]: row for row in read_csv(full.directory / "report" / "table2-mnist_fc.csv")
    }
    cell = rows["SASG"]["uploads to the target: deviation"]
    assert float(cell) == pytest.approx(23_000 / 22_823 - 1)
    assert float(rows["SASG"]["uploads to the target: ours"]) == 23_000
    points = read_csv(full.directory / "report" / "figure2-mnist_fc.csv")
    (third,) = [p for p in points if p["method"] == "sasg" and p["round"] == "6000"]
    assert third["seeds"] == "5"
    assert float(third["uploads mean"]) == pytest.approx(23_000, abs=2)
    lowest, highest = (0.98 + 0.001 * seed - 0.05 * math.exp(-6) for seed in (1, 5))
    assert float(third["test_accuracy min"]) == pytest.approx(lowest)
    assert float(third["test_accuracy max"]) == pytest.approx(highest)


def test_every_figure_and_table_has_its_files(full, page):
    files = [value for _, key, value in page.attributes if key == "href"]
    files = [full.directory / name for name in files if name.startswith("report/")]
    assert {path.suffix for path in files} == {".png", ".csv"}
    assert all(path.stat().st_size > 0 for path in files)
    images = [value for tag, key, value in page.attributes if (tag, key) == ("img", "src")]
    assert len(images) == sum(path.suffix == ".png" for path in files) == 13


def test_lines_are_means_and_bands_go_from_the_lowest_seed_to_the_highest(folder, monkeypatch):
    for seed, at_target in ((1, 22_200), (2, 23_100), (3, 26_700)):  # their mean is 24,000
        folder.add_run("sasg", seed, at_target)
    drawn = {}

    def draw(bands, path, **options):
        drawn[path.name] = bands
        plot_bands(bands, path, **options)

    monkeypatch.setattr(trained, "plot_bands", draw)
    folder.page()
    (band,) = drawn["figure2-mnist_fc-accuracy.png"]
    assert (band.method, band.x) == ("sasg", [8_000, 16_000, 24_000, 32_000])
    last = (band.low[-1], band.mean[-1], band.high[-1])  # a seed more is 0.1 points more
    assert last == pytest.approx([0.98 + x - 0.05 * math.exp(-8) for x in (0.001, 0.002, 0.003)])
    (band,) = drawn["figure2-mnist_fc-loss.png"]
    first = (band.low[0], band.mean[0], band.high[0])
    assert first == pytest.approx([math.exp(-1) + x for x in (0.01, 0.02, 0.03)])


def test_numbers_near_the_papers_hold(full):
    assert full.verdict("Table II, MNIST: mean uploads")[0] == claims.HOLDS
    status, evidence = full.verdict("Table II, MNIST: SASG needs at most 0.42")
    assert status == claims.HOLDS
    assert "23,000 / 61,000 = 0.38" in evidence


def test_a_cell_that_is_too_far_off_is_said_to_be(folder):
    folder.add_table2(folder.UPLOADS | {"sasg": (25_700,) * 5})  # +12.6 %, and 0.421 of SGD's
    page = folder.page()
    assert page.row("table2-mnist_fc", "SASG")[3] == "+12.6 % outside"
    assert ("td", "class", " outside") in page.attributes
    status, evidence = folder.verdict("Table II, MNIST: mean uploads")
    assert status == claims.FAILS
    assert evidence.endswith("Outside: SASG.")
    assert "SASG +12.6 %" in page.text("glance")
    assert page.text("glance").count("✗ does not hold") == 2
    assert folder.verdict("Table II, MNIST: SASG needs at most 0.42")[0] == claims.FAILS


def test_seeds_that_did_not_reach_the_target_are_counted_and_not_averaged(folder):
    folder.add_table2(
        folder.UPLOADS | {"sasg": (22_000, None, 24_000, None, 23_000), "lasg": (None,)}
    )
    page = folder.page()
    assert page.row("table2-mnist_fc", "SASG")[:3] == ["3 of 5", "22,823", "23,000 ± 1,000"]
    assert page.row("table2-mnist_fc", "LASG")[:4] == ["0 of 1", "33,853", "not reached", "–"]
    assert folder.verdict("Table II, MNIST: mean uploads")[0] == claims.OPEN


def test_a_run_that_is_not_done_is_in_no_mean_and_is_named(folder):
    folder.add_run("sasg", 1, 23_000)
    folder.add_run("sasg", 2, 29_000, done=False)
    page = folder.page()
    assert page.row("table2-mnist_fc", "SASG")[:3] == ["1 of 1", "22,823", "23,000"]
    unfinished = "mnist_fc-sasg-seed2, evaluated up to round 4,000 of 8,000"
    assert unfinished in page.text("not-run")
    assert "mnist_fc-sasg-seed1," not in page.text("not-run")


@pytest.mark.parametrize("change", [{"target_accuracy": 0.97}, {"num_workers": 4}])
def test_another_setting_is_not_compared_with_the_paper(folder, monkeypatch, change):
    monkeypatch.setitem(CONFIGS, "mnist_fc", dataclasses.replace(CONFIGS["mnist_fc"], **change))
    folder.add_run("sasg", 1, 23_000)
    row = folder.page().row("table2-mnist_fc", "SASG")
    assert row == ["1 of 1", "not comparable", "23,000", "–", "not comparable", "3.00e9", "–"]


def test_cifar_is_labelled_with_what_it_is(page):
    section = "table2-cifar10_narrow"
    assert page.text(section).startswith("Table II: CIFAR-10 (JPEG), narrow ResNet18")
    c = CONFIGS["cifar10_narrow"].alpha_c
    assert f"(α = c·M/γ): LASG {c['lasg']:g}, SASG {c['sasg']:g}." in page.text(section)
    assert page.row(section, "SASG")[:4] == ["2 of 2", "not comparable", "3,000 ± 0", "–"]
    assert page.tables[section][1][1][8] == "model state"
    assert page.row(section, "SASG", table=1)[7] == "2 MB"


# Figures and measurements -------------------------------------------------------------------------


def test_claims_of_the_figures_hold_with_their_numbers(full, page):
    status, evidence = full.verdict("Figure 4: at every density")
    assert status == claims.HOLDS
    assert "at 0.1 % 23,000 against 60,000 (0.38 of it)" in evidence
    assert "at 1 % 23,000 against 62,000 (0.37 of it)" in evidence
    assert "In ours this holds: SASG’s and Sparse’s mean uploads" in page.text("figure4")
    status, evidence = full.verdict("Figure 5")
    assert status == claims.HOLDS
    target = f"{100 * (CONFIGS['hetero_narrow'].target_accuracy or 0):.0f} %"
    assert f"uploads to {target}: SGD 9,000 (2 of 2 seeds); " in evidence
    # Seeds 1 to 3 end at 98.2 % on average, and seeds 1 to 5 at 98.3 %.
    status, evidence = full.verdict("Figure 4: the accuracy")
    assert status == claims.HOLDS
    assert "SASG ends between 98.20 % and 98.30 % at 4 densities, 0.10 points apart" in evidence


def test_claims_of_the_figures_can_fail(folder):
    folder.add_table2()
    folder.add_figure4(sasg=None)
    status, evidence = folder.verdict("Figure 4: at every density")
    assert status == claims.FAILS
    assert "at 5 % only Sparse got there" in evidence
    status, evidence = folder.verdict("Figure 4: the accuracy")  # 96 % where it did not
    assert status == claims.FAILS
    assert "SASG ends between 96.00 % and 98.30 %" in evidence
    folder.add_cifar("hetero_narrow", (9_000, 2_000, 6_000, 3_000))
    status, evidence = folder.verdict("Figure 5")
    assert status == claims.FAILS
    assert "Sparse 2,000" in evidence
    page = folder.page()
    assert "In ours this does not hold" in page.text("figure5")
    assert "In ours this does not hold" in page.text("figure4")


def test_times_are_ratios_beside_the_papers(full, page):
    row = page.row("figure3", "SASG, lazy")
    assert row[:4] == ["4.0", "40 ms", "1/20.0", "1/25.0"]
    assert row[4] == f"+{100 * (327.45 / 13.09 / 20 - 1):.1f} %"
    assert row[5:] == ["8.9 MB", "4.26 MB"]
    assert page.row("figure3", "SGD, psum")[2:4] == ["1", "1"]
    assert page.row("figure3", "LASG, lazy")[2:4] == ["5.0", "1/1.1"]
    status, evidence = full.verdict("Table III")
    assert status == claims.FAILS
    assert "SASG 1/20.0 over lazy (1/25.0 in the paper)" in evidence
    assert evidence.endswith("Not faster than SGD: LASG.")


def test_theory_names_the_checks_that_fail(full, page, folder):
    assert full.verdict("Theory") == (claims.HOLDS, "2 of 2 checks hold.")
    assert page.row("theory", "residual")[2:6] == ["0.012", "≤ 0.5", "holds", "0"]
    slopes = [value for _, key, value in page.attributes if key == "alt" and "slope" in value]
    assert len(slopes) == 2
    assert all("SASG slope −0.52" in text for text in slopes)
    folder.add_theory(holds=False)
    status, evidence = folder.verdict("Theory")
    assert status == claims.FAILS
    assert "1 of 2" in evidence
    assert "compression (ridge regression, SASG)" in evidence


def test_what_was_run_and_how(page):
    (row,) = [r for r in page.tables["environment"][1] if r[0] == "mnist_fc-sasg-seed2"]
    assert row[1:5] == ["2", "8,000 of 8,000", "1 time", "0, 1,200"]
    assert row[-1] == "python -m experiments reproduce table2 --out DIR"
    assert "the paper’s cells for them are not at hand" in page.text("not-run")
    assert "planned" not in page.text("not-run")


# Partial results, and what is not results ---------------------------------------------------------


def test_partial_results_say_what_makes_the_rest(folder):
    folder.add_theory()
    page = folder.page()
    for section, target in (
        ("table2-mnist_fc", "table2"),
        ("table2-cifar10_narrow", "table2"),
        ("figure2", "figure2"),
        ("figure3", "table3"),
        ("figure4", "figure4"),
        ("figure5", "figure5"),
    ):
        assert f"python -m experiments reproduce {target} --out DIR" in page.text(section)
    assert "reproduce" not in page.text("theory")
    assert page.text("glance").count("… not known yet") == 7
    count = len(RUNS["figure5"])
    assert f"figure5: {count} of {count} planned runs are not done." in page.text("not-run")


def test_a_complete_page_asks_for_nothing(page):
    assert not any("is there yet" in page.text(section) for section in page.sections)


@pytest.mark.parametrize("make", [True, False])
def test_a_folder_without_results_is_refused(tmp_path, make):
    directory = tmp_path / "empty"
    if make:
        directory.mkdir()
    with pytest.raises(FileNotFoundError, match=r"Expected .*empty to be a folder with results\."):
        write_report(directory)
    assert not (directory / "report.html").exists()


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("wire/wire.json", '{"measurements": [', "to be JSON: "),
        ("wire/wire.json", '{"measurements": []}', "to hold setting, network"),
        ("theory/theory.json", "", "to be JSON: "),
        ("runs/mnist_fc-sasg-seed1/run.json", "{", "to be JSON: "),
        ("runs/mnist_fc-sasg-seed1/run.json", "{}", "to hold name, config"),
        ("runs/mnist_fc-sasg-seed1/record.json", "no", "to be JSON: "),
        ("runs/mnist_fc-sasg-seed1/record.json", "{}", "to hold "),
        ("runs/mnist_fc-sasg-seed1/curve.jsonl", "{]\n", "to be JSON: "),
    ],
)
def test_a_broken_file_is_named(folder, file, content, says):
    folder.add_run("sasg", 1, 23_000)
    path = folder.directory / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    with pytest.raises(ResultsError, match=f"Expected {path} {says}"):
        write_report(folder.directory)


def test_text_is_escaped(folder):
    folder.add_run("sasg", 1, 23_000)
    path = folder.directory / "runs" / "mnist_fc-sasg-seed1" / "run.json"
    about = json.loads(path.read_text())
    about["sessions"][0]["command"] = "echo <script>alert(1)</script> '\"&"
    path.write_text(json.dumps(about))
    page = folder.page()
    assert "script" not in page.tags
    (row,) = [r for r in page.tables["environment"][1] if r[0] == "mnist_fc-sasg-seed1"]
    assert row[-1] == about["sessions"][0]["command"]
