"""Results on disk: whole at any moment, never lost, and never mixed up."""

import dataclasses
import json
from typing import Any

import pytest

from experiments.configs import CONFIGS
from experiments.training import records
from experiments.training.records import Point, Record, ResultsError, RunFiles, Store


def make(cls, **given):
    """A record or a point with a number in every field that is not given."""
    fields = [field.name for field in dataclasses.fields(cls)]
    return cls(**{name: given.get(name, i) for i, name in enumerate(fields)})


def spec(method="sasg", seed=1, **changes):
    config = dataclasses.replace(CONFIGS["digits"], **changes)
    config = {**dataclasses.asdict(config), "alpha_c": dict(config.alpha_c)}
    return {"name": f"digits-{method}-seed{seed}", "config": config, "method": method, "seed": seed}


def begun(store, **options) -> RunFiles:
    described = spec(**options)
    files = store.run(described["name"])
    with files.claimed(described):
        pass
    return files


def test_points_are_added_and_read_back(tmp_path):
    files = begun(Store(tmp_path / "new" / "folder"))
    points = [make(Point, iteration=100, uploads=2**60), make(Point, iteration=200)]
    assert files.curve() == []
    for point in points:
        files.append_point(point)
    assert files.curve() == [dataclasses.asdict(point) for point in points]


def test_the_summary_has_the_records_of_the_runs_that_are_done_in_order(tmp_path):
    store = Store(tmp_path)
    for seed, method in ((2, "sgd"), (1, "sasg"), (1, "lasg"), (1, "sgd")):
        files = begun(store, method=method, seed=seed)
        if method != "lasg":
            files.finish(make(Record, method=method, seed=seed))
    store.write_summary()
    summary = json.loads(store.summary_path.read_text())
    assert [(r["seed"], r["method"]) for r in summary] == [(1, "sgd"), (1, "sasg"), (2, "sgd")]
    assert summary == store.records()


def test_the_target_is_where_the_curve_first_reaches_it():
    curve = [
        dataclasses.asdict(make(Point, iteration=i, uploads=10 * i, test_accuracy=accuracy))
        for i, accuracy in ((100, 0.4), (200, 0.5), (300, 0.45), (400, 0.6))
    ]
    for target, round in ((0.3, 100), (0.5, 200), (0.51, 400)):
        found = records.at_target(curve, target)
        assert found["target_accuracy"] == target
        assert found["iterations_at_target"] == round
        assert found["uploads_at_target"] == 10 * round
        assert found["uplink_bytes_at_target"] == curve[0]["uplink_bytes"]
    never = records.at_target(curve, 0.7)
    assert {value for key, value in never.items() if key.endswith("_at_target")} == {None}
    assert never.keys() == found.keys()


def test_another_target_is_no_other_run_and_is_asked_of_the_curve(tmp_path):
    files = begun(Store(tmp_path), target_accuracy=0.9)
    for i, accuracy in ((100, 0.4), (200, 0.5)):
        files.append_point(make(Point, iteration=i, test_accuracy=accuracy))
    files.finish(make(Record))
    record = files.record()
    assert record is not None
    assert record["iterations_at_target"] is None
    with files.claimed(spec(target_accuracy=0.5)):
        files.adopt(spec(target_accuracy=0.5))
    assert files.about()["config"]["target_accuracy"] == 0.5
    again = files.record()
    assert again is not None
    assert (again["target_accuracy"], again["iterations_at_target"]) == (0.5, 200)
    assert {**again, **records.derived(record, spec(target_accuracy=0.9), files.curve())} == record


def test_both_ways_and_gradients_follow_from_the_counts(tmp_path):
    """In the end and at the target; SASG takes two gradients in a round, and H steps H."""
    for method, steps, each in (("sgd", 1, 1), ("sasg", 1, 2), ("turn", 4, 4)):
        files = begun(
            Store(tmp_path / method), method=method, target_accuracy=0.5, local_steps=steps
        )
        point = make(Point, iteration=10, test_accuracy=0.5, uplink_bytes=3, downlink_bytes=40)
        files.append_point(point)
        record = make(Record, method=method, iterations=20, uplink_bytes=7, downlink_bytes=80)
        files.finish(record)
        found = files.record()
        assert found is not None
        assert (found["two_way_bytes"], found["two_way_bytes_at_target"]) == (87, 43)
        assert found["gradients_per_worker"] == 20 * each
        assert found["gradients_per_worker_at_target"] == 10 * each


@pytest.mark.parametrize(
    ("method", "own"), [("sgd", None), ("sparse", None), ("lasg", "lasg"), ("sasg_two_way", "sasg")]
)
def test_only_its_own_c_makes_another_run(tmp_path, method, own):
    files = begun(Store(tmp_path), method=method)
    for name in ("lasg", "sasg"):
        changed = spec(method, alpha_c={"lasg": 0.5, "sasg": 0.5} | {name: 7.0})
        if name == own:
            with pytest.raises(ResultsError, match=rf"alpha_c.{name} is 0.5 there and 7.0 here"):
                files.check(changed)
        else:
            with files.claimed(changed):
                files.adopt(changed)
            assert files.about()["config"]["alpha_c"][name] == 7.0


def test_what_is_only_needed_to_go_on_is_removed_at_the_end(tmp_path):
    files = begun(Store(tmp_path))
    files.checkpoints_path.mkdir()
    (files.checkpoints_path / "file").write_text("")
    files.append_point(make(Point))
    assert files.record() is None
    record = make(Record)
    files.finish(record)
    outcome = dataclasses.asdict(record)
    assert files.record() == outcome | records.derived(outcome, spec(), files.curve())
    assert not files.checkpoints_path.exists()
    assert len(files.curve()) == 1


def test_a_folder_of_another_run_is_refused_and_the_difference_named(tmp_path):
    store = Store(tmp_path)
    files = begun(store)
    differences: list[tuple[dict[str, Any], str]] = [
        ({"iterations": 7}, "config.iterations is 3000 there and 7 here"),
        ({"alpha_c": {"lasg": 0.5, "sasg": 0.25}}, "config.alpha_c.sasg is 0.5 there and 0.25"),
    ]
    for different, message in differences:
        with (
            pytest.raises(ResultsError, match=message),
            files.claimed(spec(**different)),
        ):
            pass
    with files.claimed(spec()):  # and is as it was
        pass


def test_results_of_another_experiment_are_not_mixed_in(tmp_path):
    store = Store(tmp_path)
    begun(store)
    store.check_config("digits")
    with pytest.raises(ResultsError, match=r"holds results of digits.*for mnist_fc"):
        store.check_config("mnist_fc")


def test_a_run_that_is_being_made_is_left_alone(tmp_path):
    files, others = (Store(tmp_path).run("digits-sasg-seed1") for _ in range(2))
    with (
        files.claimed(spec()),
        pytest.raises(ResultsError, match="Another process is at work"),
        others.claimed(spec()),
    ):
        pass
    with others.claimed(spec()):
        pass


def test_a_point_that_comes_again_must_be_the_same(tmp_path):
    files = begun(Store(tmp_path))
    points = [make(Point, iteration=i, test_accuracy=0.1) for i in (100, 200, 300)]
    for point in [*points, points[1]]:
        files.append_point(point)
    assert [point["iteration"] for point in files.curve()] == [100, 200, 300]
    with pytest.raises(ResultsError, match=r"Round 200 of .* did not come again"):
        files.append_point(dataclasses.replace(points[1], test_accuracy=0.2))


def test_sessions_are_added(tmp_path):
    files = begun(Store(tmp_path))
    for first_round in (0, 700):
        files.add_session({**records.session(["run", "a b"]), "round": first_round})
    sessions = files.about()["sessions"]
    assert [session["round"] for session in sessions] == [0, 700]
    assert sessions[0]["command"] == "python -m experiments run 'a b'"
    assert {"jax", "optax", "python"} <= sessions[0]["versions"].keys()
    with files.claimed(spec()):  # they do not make it another run
        pass


def test_an_interrupted_write_leaves_the_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    records.write_json(path, {"a": 1})
    files = begun(Store(tmp_path))
    files.append_point(make(Point, iteration=100))

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        records.write_json(path, {"a": 2})
    with pytest.raises(KeyboardInterrupt):
        files.append_point(make(Point, iteration=200))
    assert [point["iteration"] for point in files.curve()] == [100]
    assert json.loads(path.read_text()) == {"a": 1}


def test_what_says_of_no_metric_how_well_a_run_does_is_broken(tmp_path):
    files = begun(Store(tmp_path))
    files.append_point(make(Point, iteration=1, test_accuracy=0.5, bits_per_byte=None))
    files.finish(make(Record, final_test_accuracy=0.5, final_bits_per_byte=None))
    for path, lacks in (("curve.jsonl", "test_accuracy"), ("record.json", "final_test_accuracy")):
        content = json.loads((files.directory / path).read_text())
        (files.directory / path).write_text(json.dumps({**content, lacks: None}))
        with pytest.raises(ResultsError, match=rf"{path} to hold {lacks} or .*bits_per_byte\.$"):
            files.curve() if path == "curve.jsonl" else files.record()
