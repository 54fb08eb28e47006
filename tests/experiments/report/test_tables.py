"""The table says what the records say, and no more."""

import io

import pytest
import rich.console

from experiments.report import tables


def record(method, seed=1, reached=True, **values):
    base = {
        "config": "digits",
        "dataset": "digits",
        "method": method,
        "seed": seed,
        "target_accuracy": 0.95,
        "iterations_at_target": 300,
        "uploads_at_target": 1000,
        "paper_uplink_bits_at_target": 32_000,
        "uplink_bytes_at_target": 6000,
        "downlink_bytes_at_target": 14_000_000,
        "final_test_accuracy": 0.9612,
        "ms_per_iteration": 1.25,
    } | values
    if not reached:
        base |= {key: None for key in base if key.endswith("_at_target")}
    return base


def text(records, width=80):
    console = rich.console.Console(file=io.StringIO(), width=width)
    console.print(tables.comparison_table(records))
    return console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def row(records, label):
    (line,) = [line for line in text(records).splitlines() if line.strip().startswith(label)]
    return line.split()


def test_cells_are_means_over_seeds():
    records = [
        record("sasg", 1, uploads_at_target=1000),
        record("sasg", 2, uploads_at_target=3000, downlink_bytes_at_target=16_000_000),
    ]
    assert row(records, "SASG") == "SASG 300 2,000 3.20e+04 6 kB 15 MB 96.12% 1.25".split()


def test_a_target_that_was_not_reached_is_said():
    assert "not reached" in " ".join(row([record("sgd", reached=False)], "SGD"))
    some = [record("sgd", 1), record("sgd", 2, reached=False)]
    assert "SGD: 1 of 2 seeds reached the target" in " ".join(text(some).split())
    assert row(some, "SGD") == "SGD 300 1,000 3.20e+04 6 kB 14 MB 96.12% 1.25".split()


def test_it_fits_a_terminal_of_80_columns_without_cutting_words():
    records = [record(method) for method in ("sgd", "sparse", "lasg", "sasg", "sasg_two_way")]
    assert "…" not in text(records)
    assert max(map(len, text(records).splitlines())) <= 80


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0 B"), (999, "999 B"), (1234, "1.23 kB"), (154e6, "154 MB"), (3.2e12, "3.2 TB")],
)
def test_bytes_are_shown_in_powers_of_ten(count, shown):
    assert tables.format_bytes(count) == shown
