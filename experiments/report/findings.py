"""What a folder of results says: means over seeds, and whether the paper's claims hold in them."""

import dataclasses
import json
import pathlib
import statistics
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from experiments.configs import CONFIGS
from experiments.methods import METHODS, PAPER_METHODS
from experiments.report import paper
from experiments.studies.reproduce import DENSITIES, RUNS
from experiments.training.records import Store
from experiments.wire.measure import Measurement

HOLDS, FAILS, OPEN, NOTE = "holds", "does not hold", "not known yet", "to know"
"""What a :class:`Verdict` says of its claim. A note claims nothing that could fail."""

# "The accuracy hardly depends on the density": the paper gives no number. Seeds alone differ by
# about as much.
_ACCURACY_SPREAD = 0.005


@dataclasses.dataclass(frozen=True)
class Run:
    """One run, done or not."""

    about: dict[str, Any]
    """What ``run.json`` holds."""
    curve: list[dict[str, Any]]
    record: dict[str, Any] | None
    """None while it is not done."""


@dataclasses.dataclass(frozen=True)
class Spread:
    """Of a number over seeds."""

    mean: float
    sd: float | None
    """The sample standard deviation; None for a single seed."""


@dataclasses.dataclass(frozen=True)
class Group:
    """The runs of one method on one experiment that are done, of which there is at least one."""

    method: str
    density: float | None
    """None for a method that sends everything."""
    config: dict[str, Any]
    runs: list[Run]

    @property
    def records(self) -> list[dict[str, Any]]:
        return [run.record for run in self.runs if run.record is not None]

    @property
    def reached(self) -> list[dict[str, Any]]:
        """The records of those that reached the target accuracy."""
        return [record for record in self.records if record["uploads_at_target"] is not None]

    def at_target(self, *keys: str) -> Spread | None:
        """Of a sum of record fields, over the seeds that reached the target; None if none did."""
        return _spread(self.reached, [f"{key}_at_target" for key in keys])

    def in_the_end(self, key: str) -> Spread:
        """Of a record field, over all seeds."""
        spread = _spread(self.records, [key])
        assert spread is not None  # a group has a run
        return spread


@dataclasses.dataclass(frozen=True)
class Results:
    """All that is in a folder. None or empty where nothing is there yet."""

    directory: pathlib.Path
    runs: list[Run]
    wire: dict[str, Any] | None
    theory: dict[str, Any] | None
    estimates: list[dict[str, Any]]

    def groups(self, name: str, methods: Collection[str] = METHODS) -> list[Group]:
        """Of the experiment ``name``, by density and then in the order of ``methods``."""
        by_key: dict[tuple[float, str], list[Run]] = {}
        for run in self.runs:
            config, method = run.about["config"], run.about["method"]
            if config["name"] == name and method in methods and run.record is not None:
                density = config["density"] if METHODS[method].sparse else 0.0
                by_key.setdefault((density, method), []).append(run)
        ordered = sorted(
            by_key.items(), key=lambda item: (item[0][0], list(METHODS).index(item[0][1]))
        )
        return [
            Group(method, density or None, runs[0].about["config"], runs)
            for (density, method), runs in ordered
        ]

    def standard_groups(self, name: str) -> list[Group]:
        """One for each method, at the experiment's own density."""
        standard = CONFIGS[name].density
        found = [group for group in self.groups(name) if group.density in (None, standard)]
        return sorted(found, key=lambda group: list(METHODS).index(group.method))

    @property
    def measurements(self) -> list[Measurement]:
        """Of the exchanges."""
        return [Measurement(**found) for found in self.wire["measurements"]] if self.wire else []


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A claim, what became of it here, and the numbers that say so."""

    where: str
    """The table or figure that it is about."""
    claim: str
    status: str
    evidence: str

    @property
    def title(self) -> str:
        return f"{self.where}: {self.claim}"

    @property
    def sentence(self) -> str:
        """For a paragraph on a claim of the paper's."""
        in_ours = {HOLDS: "In ours this holds", FAILS: "In ours this does not hold"}
        became = in_ours.get(self.status, "Ours do not say yet")
        return f"The paper’s claim is that {self.claim}. {became}: {self.evidence}"


def read(directory: pathlib.Path) -> Results:
    """Reads a folder that ``reproduce``, ``compare`` or ``run`` has written to.

    Raises:
      FileNotFoundError: it holds no results.
      ValueError: a file in it is not what it should be.
    """
    store = Store(directory)
    results = Results(
        directory=directory,
        runs=[Run(files.about(), files.curve(), files.record()) for files in store.runs()],
        wire=_read_json(directory / "wire" / "wire.json"),
        theory=_read_json(directory / "theory" / "theory.json"),
        estimates=[_read_json(path) for path in sorted(directory.glob("estimates/*.json"))],
    )
    if not (results.runs or results.wire or results.theory or results.estimates):
        raise FileNotFoundError(
            f"Expected {directory} to be a folder with results. "
            f"`python -m experiments reproduce all --out {directory}` makes them."
        )
    return results


def not_run(results: Results) -> dict[str, list[str]]:
    """The planned runs that are not done, by target; those of table 2 are figure 2's too."""
    done = {run.about["name"] for run in results.runs if run.record is not None}
    seen: set[str] = set()
    missing: dict[str, list[str]] = {}
    for target, planned in RUNS.items():
        names = [run.name for run in planned if run.name not in done | seen]
        seen.update(names)
        if names:
            missing[target] = names
    return missing


def is_comparable(group: Group) -> bool:
    """Whether the paper's Table II has the same setting, as far as the paper tells it."""
    same = all(group.config[key] == value for key, value in paper.MNIST_SETTING.items())
    return same and group.density in (None, paper.DENSITY) and group.method in PAPER_METHODS


def deviation(ours: float, papers: float) -> float:
    """Of ours from the paper's, as a part of the paper's."""
    return ours / papers - 1


def percent(part: float, digits: int = 1) -> str:
    """``0.0123`` as ``1.2 %``."""
    return f"{100 * part:.{digits}f}\u00a0%"


def signed_percent(part: float) -> str:
    """``-0.0123`` as ``−1.2 %``."""
    return f"{100 * part:+,.1f}\u00a0%".replace("-", "−")


def share(ratio: float) -> str:
    """``0.1`` as ``1/10.0``, ``2.5`` as ``2.5``: so many times as much or as little."""
    return f"1/{1 / ratio:.1f}" if ratio < 1 else f"{ratio:.1f}"


# Claims -------------------------------------------------------------------------------------------


def verdicts(results: Results) -> list[Verdict]:
    """All claims that the report looks into, in its order."""
    mnist = results.standard_groups("mnist_fc")
    found = [
        uploads_verdict(mnist),
        share_verdict(mnist),
        fewest_verdict(
            results.standard_groups("cifar10_narrow"),
            "CIFAR-10, narrow ResNet18",
            "SASG reaches the accuracy with the fewest uploads of the four",
        ),
        communication_verdict(results.measurements),
        *density_verdicts(results),
        heterogeneity_verdict(results),
        theory_verdict(results.theory),
    ]
    both_ways = both_ways_note(mnist)
    return found + ([both_ways] if both_ways else [])


def uploads_verdict(groups: Sequence[Group]) -> Verdict:
    """Of the criterion for Table II on MNIST."""
    tolerance = percent(paper.UPLOADS_TOLERANCE, 0)
    title = "Table II, MNIST", f"mean uploads are within {tolerance} of the paper’s cells"
    cells, outside, is_complete = [], [], True
    by_method = {group.method: group for group in groups if is_comparable(group)}
    for method in PAPER_METHODS:
        group = by_method.get(method)
        uploads = group.at_target("uploads") if group else None
        if group is None or uploads is None:
            is_complete = False
            continue
        is_complete &= len(group.reached) >= _planned_seeds("mnist_fc", method)
        off = deviation(uploads.mean, paper.MNIST_UPLOADS[method])
        cells.append(f"{METHODS[method].label} {signed_percent(off)} ({_seeds(group)})")
        if abs(off) > paper.UPLOADS_TOLERANCE:
            outside.append(METHODS[method].label)
    if not cells:
        return Verdict(*title, OPEN, "no run is done yet.")
    evidence = "; ".join(cells) + "."
    if outside:
        return Verdict(*title, FAILS, f"{evidence} Outside: {', '.join(outside)}.")
    if not is_complete:
        return Verdict(*title, OPEN, f"so far, {evidence} Not all planned seeds have got there.")
    return Verdict(*title, HOLDS, evidence)


def share_verdict(groups: Sequence[Group]) -> Verdict:
    """Of the criterion for SASG's uploads beside SGD's."""
    title = "Table II, MNIST", f"SASG needs at most {paper.LARGEST_SHARE} of SGD’s uploads"
    uploads = _uploads(group for group in groups if is_comparable(group))
    if not uploads.keys() >= {"sgd", "sasg"}:
        return Verdict(*title, OPEN, "no runs of both have reached the target yet.")
    ratio = uploads["sasg"] / uploads["sgd"]
    papers = paper.MNIST_UPLOADS["sasg"] / paper.MNIST_UPLOADS["sgd"]
    return Verdict(
        *title,
        HOLDS if ratio <= paper.LARGEST_SHARE else FAILS,
        f"{uploads['sasg']:,.0f} / {uploads['sgd']:,.0f} = {ratio:.2f}; {papers:.2f} in the paper.",
    )


def fewest_verdict(groups: Sequence[Group], where: str, claim: str) -> Verdict:
    """Whether SASG reaches the target with the fewest uploads of the paper's four methods."""
    title = where, claim
    by_method = {group.method: group for group in groups if group.method in PAPER_METHODS}
    if not by_method:
        return Verdict(*title, OPEN, "no run is done yet.")
    uploads = _uploads(by_method.values())
    target = percent(next(iter(by_method.values())).config["target_accuracy"], 0)
    cells = [
        f"{METHODS[method].label} {uploads[method]:,.0f} ({_seeds(group)})"
        if method in uploads
        else f"{METHODS[method].label} did not get there"
        for method, group in by_method.items()
    ]
    evidence = f"uploads to {target}: {'; '.join(cells)}."
    others = [count for method, count in uploads.items() if method != "sasg"]
    if "sasg" in by_method and others and uploads.get("sasg", float("inf")) >= min(others):
        return Verdict(*title, FAILS, evidence)
    if len(by_method) < len(PAPER_METHODS) or not uploads:
        return Verdict(*title, OPEN, evidence)
    return Verdict(*title, HOLDS, evidence)


def heterogeneity_verdict(results: Results) -> Verdict:
    """Of figure 5."""
    return fewest_verdict(
        results.standard_groups("hetero_narrow"),
        "Figure 5",
        "also when workers hold different data sets, SASG reaches the accuracy with the fewest "
        "uploads of the four",
    )


def density_verdicts(results: Results) -> tuple[Verdict, Verdict]:
    """The two of figure 4."""
    groups = results.groups("mnist_fc", ("sparse", "sasg"))
    return _fewer_at_every_density(groups), _accuracy_at_all_densities(groups)


def _fewer_at_every_density(groups: Sequence[Group]) -> Verdict:
    title = (
        "Figure 4",
        "at every density SASG needs fewer uploads than Sparse for the same accuracy",
    )
    cells, statuses = [], []
    for density in DENSITIES:
        at_density = {group.method: group for group in groups if group.density == density}
        uploads = _uploads(at_density.values())
        name = f"at {100 * density:g}\u00a0%"
        if len(at_density) < 2 or not uploads:
            if at_density:
                cells.append(f"{name} no comparison yet")
            statuses.append(OPEN)
        elif len(uploads) < 2:
            (only,) = uploads
            cells.append(f"{name} only {METHODS[only].label} got there")
            statuses.append(HOLDS if only == "sasg" else FAILS)
        else:
            sasg, sparse = uploads["sasg"], uploads["sparse"]
            cells.append(f"{name} {sasg:,.0f} against {sparse:,.0f} ({sasg / sparse:.2f} of it)")
            statuses.append(HOLDS if sasg < sparse else FAILS)
    if not cells:
        return Verdict(*title, OPEN, "no run is done yet.")
    target = percent(groups[0].config["target_accuracy"], 0)
    evidence = f"SASG’s and Sparse’s mean uploads to {target}: {'; '.join(cells)}."
    return Verdict(*title, _all_of(statuses), evidence)


def _accuracy_at_all_densities(groups: Sequence[Group]) -> Verdict:
    title = "Figure 4", "the accuracy hardly depends on the density"
    if not groups:
        return Verdict(*title, OPEN, "no run is done yet.")
    cells, statuses = [], []
    for method in ("sparse", "sasg"):
        final = {
            group.density: group.in_the_end("final_test_accuracy").mean
            for group in groups
            if group.method == method
        }
        if len(final) < 2:
            statuses.append(OPEN)
            continue
        least, most = min(final.values()), max(final.values())
        cells.append(
            f"{METHODS[method].label} ends between {percent(least, 2)} and {percent(most, 2)} at "
            f"{len(final)} densities, {100 * (most - least):.2f} points apart"
        )
        if most - least > _ACCURACY_SPREAD:
            statuses.append(FAILS)
        else:
            statuses.append(HOLDS if final.keys() >= set(DENSITIES) else OPEN)
    if not cells:
        return Verdict(*title, OPEN, "so far there is one density only.")
    evidence = "; ".join(cells) + f". We call up to {100 * _ACCURACY_SPREAD:g} points hardly."
    return Verdict(*title, _all_of(statuses), evidence)


def communication_verdict(measurements: Sequence[Measurement]) -> Verdict:
    """Of table III's order, with every method over the exchange that is fastest for it."""
    title = (
        "Table III",
        "Sparse, LASG and SASG each take less time to communicate than SGD, and SASG least",
    )
    fastest = fastest_exchanges(measurements)
    if "sgd" not in fastest or len(fastest) < 2:
        return Verdict(*title, OPEN, "it has not been measured yet.")
    base = fastest["sgd"].communication_ms
    times = {method: found.communication_ms / base for method, found in fastest.items()}
    cells = [
        f"{METHODS[method].label} {share(ratio)} over {fastest[method].exchange} "
        f"({share(_papers_time(method))} in the paper)"
        for method, ratio in times.items()
        if method != "sgd"
    ]
    evidence = (
        f"time of the exchange beside SGD’s over {fastest['sgd'].exchange}, each method over its "
        f"fastest: {'; '.join(cells)}."
    )
    slower = [
        METHODS[method].label for method, ratio in times.items() if method != "sgd" and ratio >= 1
    ]
    if slower:
        return Verdict(*title, FAILS, f"{evidence} Not faster than SGD: {', '.join(slower)}.")
    if "sasg" in times and times["sasg"] > min(times.values()):
        return Verdict(*title, FAILS, f"{evidence} SASG’s is not the least.")
    return Verdict(*title, HOLDS if len(times) == len(PAPER_METHODS) else OPEN, evidence)


def fastest_exchanges(measurements: Sequence[Measurement]) -> dict[str, Measurement]:
    """Of each of the paper's methods."""
    fastest: dict[str, Measurement] = {}
    for method in PAPER_METHODS:
        measured = [found for found in measurements if found.method == method]
        if measured:
            fastest[method] = min(measured, key=lambda found: found.communication_ms)
    return fastest


def theory_verdict(theory: Mapping[str, Any] | None) -> Verdict:
    """Of the checks of lemmas and rates."""
    title = "Theory", "the lemmas and rates hold as numbers"
    checks = theory["results"]["checks"] if theory else []
    if not checks:
        return Verdict(*title, OPEN, "they have not been measured yet.")
    failed = [check for check in checks if not check["holds"]]
    evidence = f"{len(checks) - len(failed)} of {len(checks)} checks hold."
    if failed:
        names = (f"{c['name']} ({c['problem']}, {method_label(c['method'])})" for c in failed)
        evidence += f" Those that do not: {'; '.join(names)}."
    return Verdict(*title, FAILS if failed else HOLDS, evidence)


def both_ways_note(groups: Sequence[Group]) -> Verdict | None:
    """What the paper's convention leaves out; None without the runs to say so."""
    reached = {group.method: group for group in groups if group.reached}
    if not reached.keys() >= {"sgd", "sasg"}:
        return None

    def of_sgds(method: str, *keys: str) -> str:
        return share(
            _mean_at_target(reached[method], *keys) / _mean_at_target(reached["sgd"], *keys)
        )

    both_ways = "uplink_bytes", "downlink_bytes"
    two_way = ""
    if "sasg_two_way" in reached:
        two_way = f" With a sparse way down it moves {of_sgds('sasg_two_way', *both_ways)}."
    return Verdict(
        "Table II, MNIST",
        "what is left of SASG’s saving when the way down is counted",
        NOTE,
        f"SASG moves {of_sgds('sasg', 'paper_uplink_bits')} of SGD’s bits in the paper’s "
        f"convention, {of_sgds('sasg', 'uplink_bytes')} of its bytes up with indices and flags, "
        f"and {of_sgds('sasg', *both_ways)} of its bytes both ways, as the way down is dense."
        + two_way,
    )


def method_label(method: str) -> str:
    """Its name for people; as it is where it is none of ours."""
    return METHODS[method].label if method in METHODS else method


def _mean_at_target(group: Group, *keys: str) -> float:
    spread = group.at_target(*keys)
    assert spread is not None
    return spread.mean


def _papers_time(method: str) -> float:
    return paper.COMMUNICATION_SECONDS[method] / paper.COMMUNICATION_SECONDS["sgd"]


def _uploads(groups: Any) -> dict[str, float]:
    """Mean uploads to the target by method, of those that reached it."""
    return {g.method: _mean_at_target(g, "uploads") for g in groups if g.reached}


def _planned_seeds(name: str, method: str) -> int:
    planned = RUNS["table2"]
    return sum(run.config.name == name and run.method == method for run in planned)


def _seeds(group: Group) -> str:
    count = len(group.records)
    return f"{len(group.reached)} of {count} seed{'' if count == 1 else 's'}"


def _all_of(statuses: Sequence[str]) -> str:
    """One failure is enough; otherwise one that is not known is."""
    return next((status for status in (FAILS, OPEN) if status in statuses), HOLDS)


def _spread(records: Sequence[dict[str, Any]], keys: Sequence[str]) -> Spread | None:
    if not records:
        return None
    values = [sum(record[key] for key in keys) for record in records]
    return Spread(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None)


def _read_json(path: pathlib.Path) -> Any:
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"Expected {path} to be JSON: {error}.") from None
