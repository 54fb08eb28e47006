"""Results on disk: whole at any moment, and never lost."""

import dataclasses
import json

import pytest

from experiments.records import Point, Record, Store


def make(cls, **given):
    """A record or a point with a number in every field that is not given."""
    fields = [field.name for field in dataclasses.fields(cls)]
    return cls(**{name: given.get(name, i) for i, name in enumerate(fields)})


def test_records_and_points_are_added_and_read_back(tmp_path):
    store = Store(tmp_path / "new" / "folder")
    first, second = make(Record, method="sgd", uploads=2**60), make(Record, method="sasg")
    store.append_record(first)
    store.append_record(second)
    assert store.records() == [dataclasses.asdict(first), dataclasses.asdict(second)]
    points = [make(Point, iteration=100), make(Point, iteration=200)]
    for point in points:
        store.append_point("sasg", 1, point)
    assert store.curve("sasg", 1) == [dataclasses.asdict(point) for point in points]


def test_a_run_that_would_write_over_another_is_refused(tmp_path):
    store = Store(tmp_path)
    store.append_point("sasg", 1, make(Point))
    store.check_free("digits", [("sasg", 2), ("sgd", 1)])
    with pytest.raises(FileExistsError, match=r"earlier run of sasg with seed 1.*another --out"):
        store.check_free("digits", [("sgd", 1), ("sasg", 1)])


def test_results_of_another_configuration_are_not_mixed_in(tmp_path):
    store = Store(tmp_path)
    store.append_record(make(Record, config="digits"))
    store.check_free("digits", [("sgd", 1)])
    with pytest.raises(FileExistsError, match=r"holds results of digits.*for mnist_fc"):
        store.check_free("mnist_fc", [("sgd", 1)])


def test_an_interrupted_write_leaves_the_summary_whole(tmp_path, monkeypatch):
    store = Store(tmp_path)
    store.append_record(make(Record))
    before = store.summary_path.read_text()

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.append_record(make(Record))
    assert store.summary_path.read_text() == before


def test_settings_of_all_commands_are_kept(tmp_path):
    store = Store(tmp_path)
    store.write_settings({"command": "one"})
    store.write_settings({"command": "two"})
    saved = json.loads((tmp_path / "settings.json").read_text())
    assert [entry["command"] for entry in saved] == ["one", "two"]
