"""The algorithm as a plain NumPy loop: the reference that the library is tested against.

Nothing here is fast and nothing is shared with the library. M workers hold a residual ``e`` (or a
reconstruction ``h``), the parameters ``w_s`` and the rate ``gamma_s`` of their last upload and (at
the server) their last message. In round t (`train`)

1. a worker computes its direction ``g`` at ``w_t``, e.g. a gradient;
2. it decides whether to upload: always, in turn (`in_turn`), or by rule (6): it computes ``g'`` at
   ``w_s`` on the same batch and stays silent when ``||g - g'||^2`` is at most the threshold
   (`stays_silent`), unless it must upload (`must_upload`); or by comparing two things of the same
   unit (`ratio`), with a bound that is given or that it finds itself (`Measured`); or in turns of a
   period that it finds itself (`OwnPeriod`);
3. one that uploads sends ``C(gamma g + beta e)`` and keeps the rest, or sends ``C(gamma g - h)``
   and adds it to ``h`` (`upload`);
4. the server steps with the mean of what everybody counts as (`server_step`), and what follows the
   server makes the parameters' step of it (``after``).

A *tree* is a dict of float32 arrays; every tree of a run has the keys and shapes of ``params``.
Trees are replaced, never written into, so that keeping one needs no copy.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

Tree = dict[str, np.ndarray]
Weights = float | Sequence[float]  # alpha_d: one number for every d, or D of them


# The loop -----------------------------------------------------------------------------------------


@dataclass
class Trace:
    """What happened in a run of T rounds with M workers.

    Without an upload rule that measures (``alpha=None``) ``innovation`` and ``threshold`` are zero;
    so is the innovation where a worker must upload anyway, is absent or its gradient is not finite.
    Before its first upload a worker counts as beyond the staleness cap (``staleness`` is
    max_staleness + t; 1 + t where nothing forces uploads).
    """

    params: Tree  # after the last round
    uploaded: np.ndarray  # shape=(T, M), dtype=bool
    innovation: np.ndarray  # shape=(T, M), dtype=float32
    threshold: np.ndarray  # shape=(T,), dtype=float32
    staleness: np.ndarray  # shape=(T, M), dtype=int: tau as the round began
    residuals: list[Tree]  # M trees, after the last round
    reconstructions: list[Tree]  # M trees, after the last round
    downlink_residual: Tree  # after the last round; zero when the downlink is not compressed
    params_history: list[Tree]  # T + 1 trees: before round 0, after round 0, ...
    margin: float
    """How far the closest choice was from going the other way: the smallest relative distance of an
    entry that was sent to one that was not, or of an innovation to the threshold. Two programs that
    round otherwise need not agree on a closer one."""


@dataclass
class Message:
    """What crosses the wire; a dense message has ``indices=None``."""

    values: Tree  # shape=(k,) each, or the tensor's own shape when dense
    indices: Tree | None  # shape=(k,) each, dtype=int: positions in the flattened tensor
    margin: float = np.inf  # see `Trace`


@dataclass(frozen=True)
class Measured:
    """A rule that compares a `ratio` with theta, or with a bound of its own that holds a rate."""

    what: str  # "innovation", "message_share", "residual_norm" or "direction_change"
    theta: float = 0.0
    max_staleness: int = 4  # a turn, and the latest that a worker uploads
    rate: float | None = None  # uploads per round that the worker's own bound is moved to hold
    gain: float = 0.3


@dataclass(frozen=True)
class OwnPeriod:
    """Turns of a period that each worker halves or doubles."""

    theta: float
    max_staleness: int
    look_every: int


@dataclass
class Worker:
    """One worker's state, and the server's memory of its last message."""

    residual: Tree
    reconstruction: Tree
    stale_params: Tree
    last_upload: int  # round s
    last_rate: np.float32  # gamma_s
    message: Message
    last_direction: Tree  # of the last upload
    log_bound: np.float32 | None = None  # where a rate is held; None before anything is measured
    period: int = 1
    uploads: int = 0  # since the last look; 0 before the first upload
    must_upload: bool = False  # whatever the rule says: it has joined, or its message is gone


def train(
    grad: Callable[[int, int, Tree], Tree],
    params: Tree,
    *,
    num_workers: int,
    rounds: int,
    learning_rate: float | Callable[[int], float] | None,
    density: float | None = None,
    alpha: Weights | Callable[[float], Weights] | None = None,
    turn: tuple[int, bool] | None = None,
    measured: Measured | None = None,
    own_period: OwnPeriod | None = None,
    max_staleness: int = 10,
    history: int = 10,
    silence: str | None = None,
    feedback: str = "residual",
    decay: float = 1.0,
    downlink_density: float | None = None,
    scope: str = "tensor",
    present: np.ndarray | None = None,
    after: Callable[[Tree], Tree] = lambda step: step,
    resizes: Mapping[int, tuple[Sequence[int], int]] = MappingProxyType({}),
) -> Trace:
    """Runs the algorithm: SGD, Sparse, LASG, SASG, and their neighbours.

    Args:
      grad: ``grad(worker, round, params)``, the direction on that worker's batch of that round.
      params: w_0, a tree.
      num_workers: M.
      rounds: T; rounds are numbered from 0.
      learning_rate: gamma, or a function of the round; None where only ``after`` has one.
      density: kept fraction k/d of an upload; None sends everything.
      alpha: weight of a step in the threshold, or ``history`` of them (nearest step first), or a
        function of gamma returning either; with None rule (6) is not used.
      turn: a period, and whether workers are staggered.
      measured: a rule that measures something else.
      own_period: turns of periods that workers find. With none of the four everybody uploads.
      max_staleness: a worker this stale uploads, by rule (6).
      history: D, the steps that the threshold looks back on and the rounds that all upload in.
      silence: what one that sends nothing counts as: its last message ("reuse"), nothing ("keep",
        and a silent worker's residual takes in its direction), or nothing in a mean over senders
        ("drop"). None is "reuse" for rule (6), else "keep".
      feedback: "residual", "reconstruction" or "none".
      decay: beta, what of a residual is left when it is used.
      downlink_density: kept fraction of the server's step, tensor by tensor; None sends it whole.
      scope: k entries of each "tensor" of an upload, of the whole "tree", or of each of the M
        "shards" of every tensor (both ways).
      present: who takes part; None is everybody. shape=(T, M), dtype=bool
      after: what the optimiser behind makes of the server's step: what w loses.
      resizes: before which rounds other workers go on: the numbers of those who stay, and how many
        there are then. Rows of the trace have as many entries as there are workers at most.
    """
    M, D = num_workers, history
    most = max([M, *(many for _, many in resizes.values())])
    silence = silence or ("keep" if alpha is None else "reuse")
    cap = 1 if alpha is None else max_staleness
    cap = cap if measured is None else measured.max_staleness
    cap = cap if own_period is None else own_period.max_staleness
    empty = compress(zeros_like(params), None)
    nothing = zeros_like(params)

    def begin(t: int, params: Tree, joins: bool = False) -> Worker:
        worker = Worker(nothing, nothing, params, t - cap, np.float32(0), empty, nothing)
        worker.must_upload = joins
        return worker

    workers = [begin(0, params) for _ in range(M)]
    downlink_residual = zeros_like(params)
    uploaded = np.zeros((rounds, most), bool)
    innovation = np.zeros((rounds, most), np.float32)
    staleness = np.zeros((rounds, most), int)
    threshold = np.zeros(rounds + D, np.float32)  # every step adds to the D rounds after it
    params_history = [params]
    squared_steps = [np.float32(0)] * D
    of_last_step = np.zeros(D, np.float32)
    margin = np.inf

    for t in range(rounds):
        rate = learning_rate(t) if callable(learning_rate) else learning_rate
        gamma = np.float32(1 if rate is None else rate)
        if t in resizes:
            stay, M = resizes[t]
            workers = hand_over(workers, stay)
            if scope == "shards" and silence == "reuse":  # the server has those of other shards
                for worker in workers:
                    worker.message, worker.last_upload, worker.must_upload = empty, t - cap, True
            workers += [begin(t, params, joins=True) for _ in range(M - len(stay))]
        threshold[t : t + D] += of_last_step / M**2

        for m, worker in enumerate(workers):
            staleness[t, m] = t - worker.last_upload
            g = grad(m, t, params)
            if not is_finite(g) or (present is not None and not present[t, m]):
                continue  # silent, and as stale as ever
            silent = turn is not None and not in_turn(t, m, *turn)
            if alpha is not None and not must_upload(
                t, staleness[t, m], gamma, worker.last_rate, max_staleness, D
            ):
                innovation[t, m] = squared_norm(subtract(g, grad(m, t, worker.stale_params)))
                silent = stays_silent(innovation[t, m], threshold[t])
                margin = min(margin, relative_gap(innovation[t, m], threshold[t]))
            if measured is not None:
                p = pending(worker, scaled(gamma, g), feedback, decay)
                found = ratio(measured.what, worker, g, p, squared_steps, density, scope, M)
                if measured.what == "innovation":
                    found = ratio_of(
                        squared_norm(subtract(g, grad(m, t, worker.stale_params))), squared_norm(g)
                    )
                is_stale = staleness[t, m] >= cap
                if measured.rate is not None and is_stale:
                    found = np.float32(0)  # it must upload, and need not look
                due = is_stale or in_turn(t, m, cap, True)
                silent, gap = holds_back(worker, measured, found, is_stale, due)
                innovation[t, m] = found if measured.rate is not None or not due else 0
                margin = min(margin, gap)
            if own_period is not None:
                silent = not in_turn(t, m, worker.period, True)
                if not silent and is_time_to_look(worker, m, staleness[t, m], own_period):
                    again = grad(m, t, worker.stale_params)
                    found = ratio_of(squared_norm(subtract(g, again)), squared_norm(g))
                    innovation[t, m] = found
                    margin = min(margin, relative_gap(found, np.float32(own_period.theta)))
                    margin = min(margin, relative_gap(4 * found, np.float32(own_period.theta)))
                    worker.period = next_period(worker.period, found, own_period)
            if silent and not worker.must_upload:
                if silence == "keep":
                    worker.residual = add(scaled(gamma, g), scaled(decay, worker.residual))
                continue
            uploaded[t, m], worker.must_upload = True, False
            upload(worker, scaled(gamma, g), feedback, decay, density, scope, M)
            margin = min(margin, worker.message.margin)
            worker.stale_params, worker.last_upload, worker.last_direction = params, t, g
            worker.last_rate = gamma if rate is not None else np.float32(0)

        step, downlink_residual, down_margin = server_step(
            counted(workers, uploaded[t, :M], silence, feedback),
            max(1, uploaded[t].sum()) if silence == "drop" else M,
            downlink_residual,
            downlink_density,
            "tensor" if scope == "tree" else scope,
            M,
        )
        margin = min(margin, down_margin)
        squared_steps = [*squared_steps[1:], squared_norm(step)]
        step = after(step)
        old, params = params, subtract(params, step)
        params_history.append(params)
        if alpha is not None:
            of_last_step = step_weights(alpha, gamma, D) * squared_norm(subtract(params, old))

    return Trace(
        params=params,
        uploaded=uploaded,
        innovation=innovation,
        threshold=threshold[:rounds],
        staleness=staleness,
        residuals=[worker.residual for worker in workers],
        reconstructions=[worker.reconstruction for worker in workers],
        downlink_residual=downlink_residual,
        params_history=params_history,
        margin=float(margin),
    )


# The lines of the algorithm -----------------------------------------------------------------------


def in_turn(t: int, m: int, period: int, staggered: bool) -> bool:
    """Whether it is worker m's turn in round t."""
    return (t + m if staggered else t) % period == 0


def must_upload(
    t: int,
    staleness: int,
    gamma: np.float32,
    last_rate: np.float32,
    max_staleness: int,
    history: int,
) -> bool:
    """Whether rule (6) does not apply: at the start, at the cap, and where the server would go on
    applying a message of more than twice the rate, or of any rate where it is zero now."""
    rate_fell = gamma == 0 or gamma < last_rate / 2
    return t < history or staleness >= max_staleness or bool(rate_fell)


def ratio(
    what: str,
    worker: Worker,
    g: Tree,
    p: Tree,
    squared_steps: list[np.float32],
    density: float | None,
    scope: str,
    num_workers: int,
) -> np.float32:
    """What a `Measured` rule compares, but for the innovation."""
    if what == "message_share":
        rest = subtract(p, decode(compress(p, density, scope, num_workers), p))
        return ratio_of(squared_norm(p) - squared_norm(rest), squared_norm(p))
    if what == "residual_norm":
        mean = sum(squared_steps) / np.float32(len(squared_steps))
        return ratio_of(squared_norm(p), np.float32(mean * num_workers**2))
    return ratio_of(squared_norm(subtract(g, worker.last_direction)), squared_norm(g))


def ratio_of(a: np.float32, b: np.float32) -> np.float32:
    """a / b; 0 where both are zero, and infinite where b alone is."""
    return np.float32(0) if a == 0 else a / b if b != 0 else np.float32(np.inf)


def holds_back(
    worker: Worker, rule: Measured, found: np.float32, is_stale: bool, is_due: bool
) -> tuple[bool, float]:
    """Whether a worker is silent by a `Measured` rule, and how close it was. One that holds a rate
    moves its bound, and has no turn."""
    if rule.rate is None:
        return (
            (False, np.inf)
            if is_due
            else (bool(found <= rule.theta), relative_gap(found, np.float32(rule.theta)))
        )
    log = np.log(max(found, np.finfo(np.float32).tiny))
    silent, gap = False, np.inf
    if worker.log_bound is not None and not is_stale:
        silent = bool(log <= worker.log_bound)
        gap = abs(float(log - worker.log_bound))
    before = worker.log_bound
    if before is None:
        if not 0 < found < np.inf:
            return silent, gap
        before = log
    worker.log_bound = np.float32(before + rule.gain * ((not silent) - rule.rate))
    return silent, gap


def is_time_to_look(worker: Worker, m: int, staleness: int, rule: OwnPeriod) -> bool:
    """Counts an upload, and says whether it is one in which the worker compares gradients: never
    the first, and worker m's first look is sooner the larger m is."""
    worker.uploads += 1 if worker.uploads else 1 + m % rule.look_every
    looks = worker.uploads > rule.look_every and staleness <= rule.max_staleness
    if looks:
        worker.uploads = 1
    return looks


def next_period(period: int, found: np.float32, rule: OwnPeriod) -> int:
    """Half of it where too much has changed, twice where a quarter of that or less."""
    if not found <= rule.theta:
        return max(1, period // 2)
    longest = 2 ** int(math.log2(rule.max_staleness))
    return min(longest, 2 * period) if 4 * found <= rule.theta else period


def hand_over(workers: list[Worker], stay: Sequence[int]) -> list[Worker]:
    """Those who stay, with equal shares of the residuals of those who leave."""
    left = [worker.residual for m, worker in enumerate(workers) if m not in stay]
    staying = [workers[m] for m in stay]
    for residual in left:
        for worker in staying:
            worker.residual = add(worker.residual, scaled(1 / len(staying), residual))
    return staying


def stays_silent(innovation: np.float32, threshold: np.float32) -> bool:
    """Rule (6), for a worker that is free to skip: little news compared with the recent steps."""
    return bool(innovation <= threshold)


def step_weights(
    alpha: Weights | Callable[[float], Weights], gamma: np.float32, history: int
) -> np.ndarray:
    """What a step made at ``gamma`` weighs d = 1..D rounds later: shape=(D,), dtype=float32.

    Nothing, where alpha of that rate is not a finite number.
    """
    try:
        weights = np.asarray(alpha(float(gamma)) if callable(alpha) else alpha, np.float32)
    except ZeroDivisionError:
        weights = np.float32(0)
    return np.broadcast_to(np.where(np.isfinite(weights), weights, 0), (history,))


def upload(
    worker: Worker,
    x: Tree,
    feedback: str,
    decay: float,
    density: float | None,
    scope: str,
    num_workers: int,
) -> None:
    """Makes the worker's message of x = gamma g, and keeps what its feedback keeps."""
    p = pending(worker, x, feedback, decay)
    worker.message = compress(p, density, scope, num_workers)
    sent = decode(worker.message, p)
    if feedback == "residual":
        worker.residual = subtract(p, sent)
    elif feedback == "reconstruction":
        worker.reconstruction = add(worker.reconstruction, sent)


def pending(worker: Worker, x: Tree, feedback: str, decay: float) -> Tree:
    """Of what a message is made."""
    if feedback == "residual":
        return add(x, scaled(decay, worker.residual))
    return subtract(x, worker.reconstruction) if feedback == "reconstruction" else x


def counted(
    workers: list[Worker], uploaded: np.ndarray, silence: str, feedback: str
) -> list[Message]:
    """The messages that the server adds up."""
    if feedback == "reconstruction":  # all of each worker's messages, this round's too
        return [Message(worker.reconstruction, None) for worker in workers]
    if silence == "reuse":
        return [worker.message for worker in workers]
    return [worker.message for worker, sent in zip(workers, uploaded, strict=True) if sent]


def server_step(
    messages: list[Message],
    count: int,
    residual: Tree,
    downlink_density: float | None,
    scope: str,
    num_workers: int,
) -> tuple[Tree, Tree, float]:
    """Returns the server's step, the mean of ``count`` messages, the downlink residual, and the
    margin of what was sent.

    A compressed downlink sends the top of (mean + residual) and keeps the rest; what was sent is
    the step.
    """
    total = zeros_like(residual)
    for message in messages:
        total = add(total, decode(message, total))
    mean = {name: x / np.float32(count) for name, x in total.items()}
    wanted = add(mean, residual)
    message = compress(wanted, downlink_density, scope, num_workers)
    sent = decode(message, wanted)
    return sent, subtract(wanted, sent), message.margin


# Compression --------------------------------------------------------------------------------------


def compress(
    tree: Tree, density: float | None, scope: str = "tensor", num_shards: int = 1
) -> Message:
    """Keeps the entries of largest magnitude; ``density=None`` keeps the tree as it is."""
    if density is None:
        return Message(values=tree, indices=None)
    if scope == "tree":
        indices, margin = top_k_of_all(tree, density)
    else:
        kept = {
            name: top_k_of_shards(x.ravel(), density, num_shards if scope == "shards" else 1)
            for name, x in tree.items()
        }
        indices = {name: of_tensor for name, (of_tensor, _) in kept.items()}
        margin = min(margin for _, margin in kept.values())
    values = {name: tree[name].ravel()[indices[name]] for name in tree}
    return Message(values, indices, margin)


def decode(message: Message, like: Tree) -> Tree:
    """The dense tree that a message stands for, with the shapes of ``like``."""
    if message.indices is None:
        return message.values
    dense = zeros_like(like)
    for name, x in dense.items():
        x.reshape(-1)[message.indices[name]] = message.values[name]
    return dense


def top_k_of_all(tree: Tree, density: float) -> tuple[Tree, float]:
    """Flat indices, tensor by tensor, of one top k over all tensors joined in sorted-key order."""
    kept, margin = top_k(np.concatenate([tree[name].ravel() for name in sorted(tree)]), density)
    indices, start = {}, 0
    for name in sorted(tree):
        end = start + tree[name].size
        indices[name] = kept[(start <= kept) & (kept < end)] - start
        start = end
    return indices, margin


def top_k_of_shards(x: np.ndarray, density: float, num_shards: int) -> tuple[np.ndarray, float]:
    """The top k of each of equal shards of x, the last ones filled up with zeros."""
    size = math.ceil(x.size / num_shards)
    filled = np.zeros(num_shards * size, x.dtype)
    filled[: x.size] = x
    kept, margin = [], np.inf
    for start in range(0, filled.size, size):
        of_shard, margin_of_shard = top_k(filled[start : start + size], density)
        kept.append(start + of_shard)
        margin = min(margin, margin_of_shard)
    kept = np.concatenate(kept)
    return kept[kept < x.size], margin


def top_k(x: np.ndarray, density: float) -> tuple[np.ndarray, float]:
    """Indices of the k largest magnitudes of x, shape=(n,), of equals the first; and the margin."""
    k = max(1, math.floor(density * x.size))
    order = np.argsort(-np.abs(x), kind="stable")
    margin = relative_gap(*np.abs(x[order[k - 1 : k + 1]])) if k < x.size else np.inf
    return order[:k], margin


def relative_gap(a: np.floating, b: np.floating) -> float:
    """The distance of two magnitudes, of the larger; zeros, which all programs find equal, are
    infinitely apart."""
    larger = max(abs(a), abs(b))
    return float(abs(a - b) / larger) if larger > 0 else np.inf


# Trees --------------------------------------------------------------------------------------------


def zeros_like(tree: Tree) -> Tree:
    """A tree of zeros."""
    return {name: np.zeros(x.shape, x.dtype) for name, x in tree.items()}


def add(a: Tree, b: Tree) -> Tree:
    """a + b, entry by entry."""
    return {name: a[name] + b[name] for name in a}


def scaled(factor: float | np.floating, tree: Tree) -> Tree:
    """factor * x in float32, entry by entry; the tree itself where the factor is one."""
    return tree if factor == 1 else {name: np.float32(factor) * x for name, x in tree.items()}


def subtract(a: Tree, b: Tree) -> Tree:
    """a - b, entry by entry."""
    return {name: a[name] - b[name] for name in a}


def squared_norm(tree: Tree) -> np.float32:
    """The sum of squares of all entries of all tensors."""
    return np.float32(sum(np.sum(x * x) for x in tree.values()))


def is_finite(tree: Tree) -> bool:
    """Whether no entry is NaN or infinite."""
    return all(bool(np.isfinite(x).all()) for x in tree.values())


# Small problems -----------------------------------------------------------------------------------


def softmax_grad(params: Tree, images: np.ndarray, labels: np.ndarray) -> Tree:
    """The gradient of the mean cross-entropy of a linear classifier, with params b and w.

    images shape=(batch, features), labels shape=(batch,)
    """
    logits = images @ params["w"] + params["b"]
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    p[np.arange(len(labels)), labels] -= 1
    p /= len(labels)
    return {"b": p.sum(axis=0), "w": images.T @ p}


def init_params(rng: np.random.Generator, features: int, hidden: int, classes: int) -> Tree:
    """A two-layer classifier: features -> relu(hidden) -> classes, float32."""
    w1 = rng.normal(size=(features, hidden)) * np.sqrt(2 / features)
    w2 = rng.normal(size=(hidden, classes)) * np.sqrt(1 / hidden)
    return {
        "b1": np.zeros(hidden, np.float32),
        "b2": np.zeros(classes, np.float32),
        "w1": w1.astype(np.float32),
        "w2": w2.astype(np.float32),
    }


def mlp_loss(params: Tree, images: np.ndarray, labels: np.ndarray) -> np.floating:
    """Mean cross-entropy over a batch: images shape=(batch, features), labels shape=(batch,)."""
    _, log_probabilities = _mlp_forward(params, images)
    return -log_probabilities[np.arange(len(labels)), labels].mean()


def mlp_grad(params: Tree, images: np.ndarray, labels: np.ndarray) -> Tree:
    """The gradient of `mlp_loss`, in the dtype of ``params`` and ``images``."""
    hidden, log_probabilities = _mlp_forward(params, images)
    d_logits = np.exp(log_probabilities)
    d_logits[np.arange(len(labels)), labels] -= 1
    d_logits /= len(labels)
    d_hidden = (d_logits @ params["w2"].T) * (hidden > 0)
    return {
        "b1": d_hidden.sum(axis=0),
        "b2": d_logits.sum(axis=0),
        "w1": images.T @ d_hidden,
        "w2": hidden.T @ d_logits,
    }


def _mlp_forward(params: Tree, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hidden activations, shape=(batch, hidden), and log p, shape=(batch, classes)."""
    hidden = np.maximum(images @ params["w1"] + params["b1"], 0)
    logits = hidden @ params["w2"] + params["b2"]
    logits = logits - logits.max(axis=1, keepdims=True)
    return hidden, logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def make_batches(
    seed: int,
    rounds: int,
    num_workers: int,
    batch: int,
    features: int,
    classes: int,
    noise: float = 1.5,
) -> tuple[np.ndarray, np.ndarray]:
    """Every worker's batch of every round: a mean for each class, plus Gaussian noise.

    Returns:
      images, shape=(rounds, num_workers, batch, features), dtype=float32, and labels,
      shape=(rounds, num_workers, batch), dtype=int32.
    """
    rng = np.random.default_rng(seed)
    class_means = rng.normal(size=(classes, features))
    labels = rng.integers(classes, size=(rounds, num_workers, batch), dtype=np.int32)
    images = class_means[labels] + noise * rng.normal(size=(*labels.shape, features))
    return images.astype(np.float32), labels
