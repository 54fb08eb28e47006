"""The targets are made of the right runs, and go on where they were stopped."""

import collections
import dataclasses
import json

import pytest

from experiments import cli
from experiments.configs import CONFIGS
from experiments.studies import plan, reproduce
from experiments.training.records import Store
from experiments.training.runs import Run

DIGITS = dataclasses.replace(CONFIGS["digits"], iterations=20, evaluate_every=10)


def test_table_2_has_five_seeds_of_mnist_and_two_of_the_narrow_resnet():
    runs = collections.Counter((run.config.name, run.method) for run in plan.RUNS["table2"])
    methods = ("sgd", "sparse", "lasg", "sasg")
    assert runs == {("mnist_fc", m): 5 for m in methods} | {
        ("mnist_fc", "sasg_two_way"): 1,
        **{("cifar10_narrow", m): 2 for m in methods},
    }
    seeds = {run.seed for run in plan.RUNS["table2"] if run.config.name == "mnist_fc"}
    assert seeds == {1, 2, 3, 4, 5}


def test_figure_4_has_four_densities_and_shares_one_with_table_2():
    runs = plan.RUNS["figure4"]
    assert {run.config.density for run in runs} == {0.001, 0.01, 0.05, 0.1}
    assert {run.method for run in runs} == {"sparse", "sasg"}
    tabled = {run.name for run in plan.RUNS["table2"]}
    assert {run.config.density for run in runs if run.name in tabled} == {0.01}


def test_figure_5_is_heterogeneous():
    runs = plan.RUNS["figure5"]
    assert {run.config.dataset for run in runs} == {"cifar10+mnist"}
    assert {run.method for run in runs} == {"sgd", "sparse", "lasg", "sasg"}


def test_runs_of_one_name_are_the_same():
    everything = [run for runs in plan.RUNS.values() for run in runs]
    by_name = {run.name: run for run in everything}
    assert all(by_name[run.name] == run for run in everything)


@pytest.fixture
def small(monkeypatch):
    """Targets of which one cannot be made, as its data set is not there."""
    runs = [Run(DIGITS, "sgd", seed) for seed in (1, 2)]
    absent = Run(dataclasses.replace(DIGITS, name="mnist_fc", dataset="absent"), "sgd", 1)
    monkeypatch.setattr(plan, "RUNS", {"table2": runs, "figure2": runs, "figure4": [absent]})
    monkeypatch.setattr(reproduce, "OTHERS", {})


def test_each_run_is_made_once_whichever_targets_show_it(small, tmp_path, capsys):
    out = ["--out", str(tmp_path), "--quiet"]
    cli.main(["reproduce", "table2", "--seeds", "2", *out])
    assert {record["seed"] for record in Store(tmp_path).records()} == {2}
    cli.main(["reproduce", "figure2", *out])
    said = capsys.readouterr().out
    assert said.count("done before") == 1
    assert f"python -m experiments report {tmp_path}" in said.replace("\n", "")
    assert [record["seed"] for record in Store(tmp_path).records()] == [1, 2]


@pytest.fixture
def measured(monkeypatch):
    """The theory's results at once, and how often they were asked for."""
    check = {"source": "Lemma 1", "name": "compression", "problem": "p", "method": "sasg"}
    check |= {"measured": 0.5, "relation": "<=", "bound": 0.9, "tolerance": 0.0, "holds": True}
    results, calls = {"checks": [check]}, []

    def measure(on_step):
        calls.append(1)
        on_step("rate", 1, 2)
        return results

    monkeypatch.setattr("experiments.studies.theory.measure", measure)
    return results, calls


def test_a_target_that_fails_does_not_keep_the_others(small, measured, tmp_path, monkeypatch):
    """The data of one's runs are not there; the theory is measured after that."""

    def load(name, data_dir, archives):
        raise FileNotFoundError(f"the archives of {name} are missing")

    monkeypatch.setattr(reproduce.data, "load_named", load)
    monkeypatch.setattr(reproduce, "OTHERS", {"theory": "theory"})
    with pytest.raises(SystemExit, match=r"error: .*absent: the archives of absent are missing"):
        cli.main(["reproduce", "all", "--out", str(tmp_path), "--quiet"])
    assert (tmp_path / "theory" / "theory.json").exists()


def test_theory_is_measured_once(measured, tmp_path, capsys):
    results, calls = measured
    for _ in range(2):
        cli.main(["reproduce", "theory", "--out", str(tmp_path)])
    assert len(calls) == 1
    written = json.loads((tmp_path / "theory" / "theory.json").read_text())
    assert written["results"] == results
    assert written["command"].startswith("python -m experiments reproduce theory")
    said = capsys.readouterr().out
    assert "theory, 1 of 2: rate" in said
    assert "Lemma 1, compression, p, sasg: 0.5 <= 0.9 holds" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["table2", "--seeds", "1", "77"], "Expected --seeds=1 77 to be of those of table2: 1, 2."),
        (["table2", "--configs", "mnist_fc"], "Expected --configs=mnist_fc .* table2: digits."),
        (["theory", "--seeds", "1"], "Expected --seeds=1 to be of those of theory: it has none."),
    ],
)
def test_options_that_fit_no_run_are_refused(small, tmp_path, options, message):
    with pytest.raises(SystemExit, match=message):
        cli.main(["reproduce", *options, "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())
