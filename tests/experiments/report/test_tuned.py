"""The section on tuned methods says what `best.json` says, beside tuned SGD."""

import pytest

from experiments.report import tuned
from experiments.training.records import ResultsError


def test_what_a_method_takes_at_its_best_beside_tuned_sgd(page):
    row = page.row("best-mnist_fc", "SGD")
    assert row[:4] == ["rate 0.4", "5", "2 of 2", "1,000 ± 0"]
    assert row[5] == "15,000 ± 1,414"
    assert row[8:11] == ["1", "1", "1"]
    row = page.row("best-mnist_fc", "In turn")
    assert row[:3] == ["rate 0.4, period 12", "10", "1 of 2"]
    assert row[5] == "2,000"  # of the one seed that reached it
    assert row[6] == "48 MB"  # 2,000 of 24 kB
    # 2,000 of 15,000; 48 MB of 24 GB; 16.048 of 40 GB.
    assert row[8:11] == ["1/7.5", "1/500.0", "1/2.5"]


def test_it_says_how_settings_were_picked(page):
    text = page.text("best-mnist_fc")
    assert "with seed 1, those that reached 98" in text
    assert "with other seeds: 2, 3" in text
    assert "python -m experiments compare mnist_fc --learning-rates 0.2 0.4" in text


def test_a_method_that_was_tuned_by_another_command_stands_in_the_same_table(folder):
    folder.add_table2()
    folder.add_best(uploads={"sgd": (14_000, 15_000)})
    folder.add_best(folder="others", uploads={"sasg_keep": (4_000, 4_200), "turn": (None, None)})
    page = folder.page()
    assert page.row("best-mnist_fc", "SASG, keep")[5] == "4,100 ± 141"
    assert page.row("best-mnist_fc", "In turn")[2:4] == ["0 of 2", "not reached"]
    assert [row.method for row in tuned.methods(tuned.read(folder.directory)["mnist_fc"])] == [
        "sgd",
        "turn",
        "sasg_keep",
    ]


def test_without_any_it_says_how_to_make_them(folder):
    folder.add_table2()
    assert "python -m experiments compare NAME --learning-rates" in folder.page().text("best")


def test_a_broken_file_is_named(folder):
    path = folder.directory / "best" / "x" / "best.json"
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    with pytest.raises(ResultsError, match=r"best/x/best\.json to hold config, picked_by"):
        tuned.read(folder.directory)
