"""The figure holds every run's curve."""

import dataclasses
from typing import Any

import matplotlib.pyplot as plt
import pytest

from experiments.configs import CONFIGS
from experiments.methods import METHODS
from experiments.report import figures
from experiments.training.records import Point, Record, Store


@pytest.mark.parametrize("methods", [("sgd",), ("sgd", "sparse", "lasg", "sasg", "sasg_two_way")])
def test_every_run_is_drawn_in_all_six_panels(tmp_path, monkeypatch, methods):
    store = Store(tmp_path)
    numbers: dict[str, Any] = {field.name: 1 for field in dataclasses.fields(Record)}
    points: dict[str, Any] = {field.name: 1 for field in dataclasses.fields(Point)}
    for method in methods:
        for seed in (1, 2):
            files = store.run(f"{method}-{seed}")
            config = dataclasses.asdict(CONFIGS["digits"]) | {"alpha_c": {}, "target_accuracy": 0.9}
            about = {"name": files.name, "config": config, "method": method, "seed": seed}
            with files.claimed(about):
                for i in (1, 2, 3):
                    changes = {"iteration": i, "test_accuracy": 0.9 + i / 100, "train_loss": 1 / i}
                    files.append_point(Point(**(points | changes)))
                files.finish(Record(**numbers))
    kept = []
    monkeypatch.setattr(plt, "close", kept.append)
    figures.plot_curves(store.runs(), tmp_path / "curves.png", "title")
    (figure,) = kept
    assert len(figure.axes) == 6
    for i, axis in enumerate(figure.axes):
        curves = [line for line in axis.lines if len(line.get_xdata()) == 3]
        assert len(curves) == 2 * len(methods)
        key = "accuracy" if i < 3 else "loss"
        expected = [0.91, 0.92, 0.93] if key == "accuracy" else [1, 1 / 2, 1 / 3]
        assert list(curves[0].get_ydata()) == pytest.approx(expected)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == [METHODS[method].label for method in methods]
    monkeypatch.undo()
    plt.close(figure)


def test_bars_far_below_their_floor_are_seen(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(plt, "close", kept.append)
    figures.plot_ratios([("a", 0.3), ("b", 1.0), ("c", 70.0)], tmp_path / "ratios.png")
    (figure,) = kept
    (axis,) = figure.axes
    left, right = axis.get_xlim()
    widths = [bar.get_width() for bar in axis.patches]
    assert widths == [0.3, 1.0, 70.0]
    assert left < 0.9 * min(widths)
    assert right > 1.1 * max(widths)
    monkeypatch.undo()
    plt.close(figure)


def test_front_has_what_nothing_beats():
    points = [(3, 1), (1, 5), (2, 3), (2, 2), (3, 3), (9, 1), (1, 5)]
    assert figures.pareto_front(points) == [(1, 5), (2, 2), (3, 1)]
    assert figures.pareto_front([(4, 4)]) == [(4, 4)]


def test_all_that_was_tried_is_drawn_in_the_colour_of_its_method(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(plt, "close", kept.append)
    tried = {"sgd": [(4e10, 1500), (6e10, 1400)], "local_coded": [(2e7, 2900)]}
    figures.plot_tried(tried, tmp_path / "tried.png")
    (figure,) = kept
    (axis,) = figure.axes
    assert [tuple(map(tuple, dots.get_offsets())) for dots in axis.collections] == [
        tuple(found) for found in tried.values()
    ]
    assert [text.get_text() for text in axis.texts] == [METHODS[name].label for name in tried]
    assert (tmp_path / "tried.png").exists()
    monkeypatch.undo()
    plt.close(figure)
