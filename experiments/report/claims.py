"""Whether the paper's claims hold in a folder of results, and the numbers that say so."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from experiments.methods import METHODS, PAPER_METHODS
from experiments.report import paper
from experiments.report.cells import density_label, method_label, percent, share, signed_percent
from experiments.report.findings import Group, Results, fastest_exchanges
from experiments.studies.plan import DENSITIES, RUNS

HOLDS, FAILS, OPEN, NOTE = "holds", "does not hold", "not known yet", "to know"
"""What a :class:`Verdict` says of its claim. A note claims nothing that could fail."""

# "The accuracy hardly depends on the density": the paper gives no number. Seeds alone differ by
# about as much.
_ACCURACY_SPREAD = 0.005

_NO_RUN = OPEN, "no run is done yet."
_FEWEST = "SASG reaches the accuracy with the fewest uploads of the four"

Found = tuple[str, str]
"""A status and the evidence for it."""


class Verdict(NamedTuple):
    """A claim, what became of it here, and the numbers that say so."""

    where: str  # the table or figure that it is about
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


_CLAIMS: list[tuple[str, str, Callable[[Results], Found]]] = []


def verdicts(results: Results) -> list[Verdict]:
    """All claims that the report looks into, in its order."""
    found = [Verdict(where, claim, *judge(results)) for where, claim, judge in _CLAIMS]
    return found + _both_ways(results.standard_groups("mnist_fc"))


def _claim(where: str, claim: str) -> Callable:
    def add(judge: Callable[[Results], Found]) -> Callable[[Results], Found]:
        _CLAIMS.append((where, claim, judge))
        return judge

    return add


@_claim(
    "Table II, MNIST",
    f"mean uploads are within {percent(paper.UPLOADS_TOLERANCE, 0)} of the paper’s cells",
)
def _uploads_are_near(results: Results) -> Found:
    cells, outside, is_complete = [], [], True
    groups = results.standard_groups("mnist_fc")
    by_method = {group.method: group for group in groups if group.is_comparable}
    for method in PAPER_METHODS:
        group = by_method.get(method)
        if group is None or not group.reached:
            is_complete = False
            continue
        planned = [run for run in RUNS["table2"] if run.config.name == "mnist_fc"]
        is_complete &= len(group.reached) >= sum(run.method == method for run in planned)
        off = group.mean_at_target("uploads") / paper.MNIST_UPLOADS[method] - 1
        cells.append(f"{group.label} {signed_percent(off)} ({_seeds(group)})")
        if abs(off) > paper.UPLOADS_TOLERANCE:
            outside.append(group.label)
    if not cells:
        return _NO_RUN
    evidence = "; ".join(cells) + "."
    if outside:
        return FAILS, f"{evidence} Outside: {', '.join(outside)}."
    if not is_complete:
        return OPEN, f"so far, {evidence} Not all planned seeds have got there."
    return HOLDS, evidence


@_claim("Table II, MNIST", f"SASG needs at most {paper.LARGEST_SHARE} of SGD’s uploads")
def _share_of_sgd(results: Results) -> Found:
    groups = results.standard_groups("mnist_fc")
    uploads = _uploads(group for group in groups if group.is_comparable)
    if not uploads.keys() >= {"sgd", "sasg"}:
        return OPEN, "no runs of both have reached the target yet."
    ratio = uploads["sasg"] / uploads["sgd"]
    papers = paper.MNIST_UPLOADS["sasg"] / paper.MNIST_UPLOADS["sgd"]
    counts = f"{uploads['sasg']:,.0f} / {uploads['sgd']:,.0f}"
    status = HOLDS if ratio <= paper.LARGEST_SHARE else FAILS
    return status, f"{counts} = {ratio:.2f}; {papers:.2f} in the paper."


@_claim("CIFAR-10, narrow ResNet18", _FEWEST)
def _fewest_on_cifar(results: Results) -> Found:
    return _sasg_needs_fewest(results.standard_groups("cifar10_narrow"))


def _sasg_needs_fewest(groups: Sequence[Group]) -> Found:
    by_method = {group.method: group for group in groups if group.method in PAPER_METHODS}
    if not by_method:
        return _NO_RUN
    uploads = _uploads(by_method.values())
    target = percent(groups[0].config["target_accuracy"], 0)
    cells = [
        f"{group.label} {uploads[method]:,.0f} ({_seeds(group)})"
        if method in uploads
        else f"{group.label} did not get there"
        for method, group in by_method.items()
    ]
    evidence = f"uploads to {target}: {'; '.join(cells)}."
    others = [count for method, count in uploads.items() if method != "sasg"]
    if "sasg" in by_method and others and uploads.get("sasg", float("inf")) >= min(others):
        return FAILS, evidence
    is_open = len(by_method) < len(PAPER_METHODS) or not uploads
    return OPEN if is_open else HOLDS, evidence


@_claim(
    "Table III", "Sparse, LASG and SASG each take less time to communicate than SGD, and SASG least"
)
def _communication(results: Results) -> Found:
    fastest = fastest_exchanges(results.measurements)
    if "sgd" not in fastest or len(fastest) < 2:
        return OPEN, "it has not been measured yet."
    base, papers = fastest.pop("sgd"), paper.COMMUNICATION_SECONDS
    times = {m: found.communication_ms / base.communication_ms for m, found in fastest.items()}
    papers_share = {method: share(papers[method] / papers["sgd"]) for method in times}
    cells = [
        f"{METHODS[m].label} {share(ratio)} over {fastest[m].exchange} ({papers_share[m]} in the "
        "paper)"
        for m, ratio in times.items()
    ]
    beside = f"time of the exchange beside SGD’s over {base.exchange}, each method over its fastest"
    evidence = f"{beside}: {'; '.join(cells)}."
    slower = [METHODS[method].label for method, ratio in times.items() if ratio >= 1]
    if slower:
        return FAILS, f"{evidence} Not faster than SGD: {', '.join(slower)}."
    if "sasg" in times and times["sasg"] > min(times.values()):
        return FAILS, f"{evidence} SASG’s is not the least."
    return HOLDS if len(times) == len(PAPER_METHODS) - 1 else OPEN, evidence


@_claim("Figure 4", "at every density SASG needs fewer uploads than Sparse for the same accuracy")
def _fewer_at_every_density(results: Results) -> Found:
    groups, cells, statuses = results.groups("mnist_fc", ("sparse", "sasg")), [], []
    for density in DENSITIES:
        at_density = {group.method: group for group in groups if group.density == density}
        uploads = _uploads(at_density.values())
        name = f"at {density_label(density)}"
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
        return _NO_RUN
    target = percent(groups[0].config["target_accuracy"], 0)
    evidence = f"SASG’s and Sparse’s mean uploads to {target}: {'; '.join(cells)}."
    return _all_of(statuses), evidence


@_claim("Figure 4", "the accuracy hardly depends on the density")
def _accuracy_at_all_densities(results: Results) -> Found:
    groups, cells, statuses = results.groups("mnist_fc", ("sparse", "sasg")), [], []
    if not groups:
        return _NO_RUN
    for method in ("sparse", "sasg"):
        of_method = [group for group in groups if group.method == method]
        final = {g.density: g.in_the_end("final_test_accuracy").mean for g in of_method}
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
        return OPEN, "so far there is one density only."
    evidence = "; ".join(cells) + f". We call up to {100 * _ACCURACY_SPREAD:g} points hardly."
    return _all_of(statuses), evidence


@_claim("Figure 5", f"also when workers hold different data sets, {_FEWEST}")
def _fewest_on_different_sets(results: Results) -> Found:
    return _sasg_needs_fewest(results.standard_groups("hetero_narrow"))


@_claim("Theory", "the lemmas and rates hold as numbers")
def _theory(results: Results) -> Found:
    checks = results.theory["results"]["checks"] if results.theory else []
    if not checks:
        return OPEN, "they have not been measured yet."
    failed = [check for check in checks if not check["holds"]]
    evidence = f"{len(checks) - len(failed)} of {len(checks)} checks hold."
    if failed:
        names = (f"{c['name']} ({c['problem']}, {method_label(c['method'])})" for c in failed)
        evidence += f" Those that do not: {'; '.join(names)}."
    return FAILS if failed else HOLDS, evidence


def _both_ways(groups: Sequence[Group]) -> list[Verdict]:
    """What the paper's convention leaves out; nothing without the runs to say so."""
    reached = {group.method: group for group in groups if group.reached}
    if not reached.keys() >= {"sgd", "sasg"}:
        return []

    def of_sgds(method: str, *keys: str) -> str:
        return share(reached[method].mean_at_target(*keys) / reached["sgd"].mean_at_target(*keys))

    both_ways = "uplink_bytes", "downlink_bytes"
    evidence = (
        f"SASG moves {of_sgds('sasg', 'paper_uplink_bits')} of SGD’s bits in the paper’s "
        f"convention, {of_sgds('sasg', 'uplink_bytes')} of its bytes up with indices and flags, "
        f"and {of_sgds('sasg', *both_ways)} of its bytes both ways, as the way down is dense."
    )
    if "sasg_two_way" in reached:
        evidence += f" With a sparse way down it moves {of_sgds('sasg_two_way', *both_ways)}."
    claim = "what is left of SASG’s saving when the way down is counted"
    return [Verdict("Table II, MNIST", claim, NOTE, evidence)]


def _uploads(groups: Iterable[Group]) -> dict[str, float]:
    """Mean uploads to the target by method, of those that reached it."""
    return {group.method: group.mean_at_target("uploads") for group in groups if group.reached}


def _seeds(group: Group) -> str:
    count = len(group.records)
    return f"{len(group.reached)} of {count} seed{'' if count == 1 else 's'}"


def _all_of(statuses: Sequence[str]) -> str:
    """One failure is enough; otherwise one that is not known is."""
    return next((status for status in (FAILS, OPEN) if status in statuses), HOLDS)
