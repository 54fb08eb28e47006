"""The algorithm as a plain NumPy loop: the reference that the library is tested against.

Nothing here is fast and nothing is shared with the library. M workers hold a residual ``e``, the
parameters ``w_s`` of their last upload and (at the server) their last message. In round t

1. a worker computes ``g`` at ``w_t`` and ``g'`` at ``w_s``, on the same batch (`train`);
2. it stays silent when ``||g - g'||^2`` is at most the threshold (`stays_silent`), unless it is
   `max_staleness` rounds stale or t < D;
3. otherwise it sends ``C(gamma g + e)`` and keeps the rest (`upload`);
4. the server steps with the mean of everybody's last message (`server_step`).

A *tree* is a dict of float32 arrays; every tree of a run has the keys and shapes of ``params``.
Trees are replaced, never written into, so that keeping one needs no copy.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Tree = dict[str, np.ndarray]
Weights = float | Sequence[float]  # alpha_d: one number for every d, or D of them


# The loop -----------------------------------------------------------------------------------------


@dataclass
class Trace:
    """What happened in a run of T rounds with M workers.

    Without an upload rule (``alpha=None``) ``innovation`` and ``threshold`` are zero; so is the
    innovation where a worker must upload anyway or its gradient is not finite. Before its first
    upload a worker counts as beyond the staleness cap (``staleness`` is max_staleness + t).
    """

    params: Tree  # after the last round
    uploaded: np.ndarray  # shape=(T, M), dtype=bool
    innovation: np.ndarray  # shape=(T, M), dtype=float32
    threshold: np.ndarray  # shape=(T,), dtype=float32
    staleness: np.ndarray  # shape=(T, M), dtype=int: tau as the round began
    residuals: list[Tree]  # M trees, after the last round
    downlink_residual: Tree  # after the last round; zero when the downlink is not compressed
    params_history: list[Tree]  # T + 1 trees: before round 0, after round 0, ...


@dataclass
class Message:
    """What crosses the wire; a dense message has ``indices=None``."""

    values: Tree  # shape=(k,) each, or the tensor's own shape when dense
    indices: Tree | None  # shape=(k,) each, dtype=int: positions in the flattened tensor


@dataclass
class Worker:
    """One worker's state, and the server's memory of its last message."""

    residual: Tree
    stale_params: Tree
    last_upload: int  # round s
    message: Message


def train(
    grad: Callable[[int, int, Tree], Tree],
    params: Tree,
    *,
    num_workers: int,
    rounds: int,
    learning_rate: float | Callable[[int], float],
    density: float | None = None,
    alpha: Weights | Callable[[float], Weights] | None = None,
    max_staleness: int = 10,
    history: int = 10,
    downlink_density: float | None = None,
    scope: str = "tensor",
) -> Trace:
    """Runs the algorithm: SGD, Sparse, LASG or SASG, by ``density`` and ``alpha``.

    Args:
      grad: ``grad(worker, round, params)``, the gradient on that worker's batch of that round.
      params: w_0, a tree.
      num_workers: M.
      rounds: T; rounds are numbered from 0.
      learning_rate: gamma, or a function of the round.
      density: kept fraction k/d of an upload; None sends everything.
      alpha: weight of a step in the threshold, or ``history`` of them (nearest step first), or a
        function of gamma returning either; None makes every worker upload in every round.
      max_staleness: a worker this stale uploads.
      history: D, the steps that the threshold looks back on and the rounds that all upload in.
      downlink_density: kept fraction of the server's step, tensor by tensor; None sends it whole.
      scope: k entries of each "tensor" of an upload, of the whole "tree", or of each of the M
        "shards" of every tensor (both ways).
    """
    M, D = num_workers, history
    workers = [
        Worker(zeros_like(params), params, -max_staleness, compress(zeros_like(params), None))
        for _ in range(M)
    ]
    downlink_residual = zeros_like(params)
    uploaded = np.zeros((rounds, M), bool)
    innovation = np.zeros((rounds, M), np.float32)
    staleness = np.zeros((rounds, M), int)
    threshold = np.zeros(rounds + D, np.float32)  # every step adds to the D rounds after it
    params_history = [params]

    for t in range(rounds):
        gamma = np.float32(learning_rate(t) if callable(learning_rate) else learning_rate)

        for m, worker in enumerate(workers):
            g = grad(m, t, params)
            staleness[t, m] = t - worker.last_upload
            if not is_finite(g):
                continue  # silent, and as stale as ever
            may_skip = alpha is not None and t >= D and staleness[t, m] < max_staleness
            if may_skip:
                innovation[t, m] = squared_norm(subtract(g, grad(m, t, worker.stale_params)))
                if stays_silent(innovation[t, m], threshold[t]):
                    continue
            uploaded[t, m] = True
            worker.message, worker.residual = upload(g, gamma, worker.residual, density, scope, M)
            worker.stale_params = params
            worker.last_upload = t

        step, downlink_residual = server_step(
            [worker.message for worker in workers],
            downlink_residual,
            downlink_density,
            "tensor" if scope == "tree" else scope,
        )
        params = subtract(params, step)
        params_history.append(params)
        if alpha is not None:
            alphas = step_weights(alpha, gamma, D)
            threshold[t + 1 : t + 1 + D] += alphas * squared_norm(step) / M**2

    return Trace(
        params=params,
        uploaded=uploaded,
        innovation=innovation,
        threshold=threshold[:rounds],
        staleness=staleness,
        residuals=[worker.residual for worker in workers],
        downlink_residual=downlink_residual,
        params_history=params_history,
    )


# The lines of the algorithm -----------------------------------------------------------------------


def stays_silent(innovation: np.float32, threshold: np.float32) -> bool:
    """Rule (6), for a worker that is free to skip: little news compared with the recent steps."""
    return bool(innovation <= threshold)


def step_weights(
    alpha: Weights | Callable[[float], Weights], gamma: np.float32, history: int
) -> np.ndarray:
    """What a step made at ``gamma`` weighs d = 1..D rounds later: shape=(D,), dtype=float32."""
    weights = alpha(float(gamma)) if callable(alpha) else alpha
    return np.broadcast_to(np.asarray(weights, np.float32), (history,))


def upload(
    g: Tree,
    gamma: np.float32,
    residual: Tree,
    density: float | None,
    scope: str,
    num_workers: int,
) -> tuple[Message, Tree]:
    """Returns the message C(p), where p = gamma g + e, and the new residual p - C(p)."""
    p = {name: gamma * g[name] + residual[name] for name in g}
    message = compress(p, density, scope, num_workers)
    return message, subtract(p, decode(message, p))


def server_step(
    messages: list[Message], residual: Tree, downlink_density: float | None, scope: str
) -> tuple[Tree, Tree]:
    """Returns the step (what w loses) and the downlink residual.

    The step is the mean of all workers' last messages, fresh or stale. A compressed downlink sends
    the top of (mean + residual) and keeps the rest; what was sent is the step.
    """
    total = zeros_like(residual)
    for message in messages:
        total = add(total, decode(message, total))
    mean = {name: x / np.float32(len(messages)) for name, x in total.items()}
    wanted = add(mean, residual)
    sent = decode(compress(wanted, downlink_density, scope, len(messages)), wanted)
    return sent, subtract(wanted, sent)


# Compression --------------------------------------------------------------------------------------


def compress(
    tree: Tree, density: float | None, scope: str = "tensor", num_shards: int = 1
) -> Message:
    """Keeps the entries of largest magnitude; ``density=None`` keeps the tree as it is."""
    if density is None:
        return Message(values=tree, indices=None)
    if scope == "shards":
        indices = {
            name: top_k_of_shards(x.ravel(), density, num_shards) for name, x in tree.items()
        }
    else:
        indices = {"tensor": top_k_of_each, "tree": top_k_of_all}[scope](tree, density)
    return Message(
        values={name: tree[name].ravel()[indices[name]] for name in tree}, indices=indices
    )


def decode(message: Message, like: Tree) -> Tree:
    """The dense tree that a message stands for, with the shapes of ``like``."""
    if message.indices is None:
        return message.values
    dense = zeros_like(like)
    for name, x in dense.items():
        x.reshape(-1)[message.indices[name]] = message.values[name]
    return dense


def top_k_of_each(tree: Tree, density: float) -> Tree:
    """Flat indices of the top k of every tensor, k counted from that tensor's size."""
    return {name: top_k(x.ravel(), density) for name, x in tree.items()}


def top_k_of_all(tree: Tree, density: float) -> Tree:
    """Flat indices, tensor by tensor, of one top k over all tensors joined in sorted-key order."""
    kept = top_k(np.concatenate([tree[name].ravel() for name in sorted(tree)]), density)
    indices, start = {}, 0
    for name in sorted(tree):
        end = start + tree[name].size
        indices[name] = kept[(start <= kept) & (kept < end)] - start
        start = end
    return indices


def top_k_of_shards(x: np.ndarray, density: float, num_shards: int) -> np.ndarray:
    """The top k of each of equal shards of x, the last ones filled up with zeros."""
    size = math.ceil(x.size / num_shards)
    filled = np.zeros(num_shards * size, x.dtype)
    filled[: x.size] = x
    kept = [
        start + top_k(filled[start : start + size], density)
        for start in range(0, filled.size, size)
    ]
    kept = np.concatenate(kept)
    return kept[kept < x.size]


def top_k(x: np.ndarray, density: float) -> np.ndarray:
    """Indices of the k largest magnitudes of x, shape=(n,); of equals, the first."""
    k = max(1, math.floor(density * x.size))
    return np.argsort(-np.abs(x), kind="stable")[:k]


# Trees --------------------------------------------------------------------------------------------


def zeros_like(tree: Tree) -> Tree:
    """A tree of zeros."""
    return {name: np.zeros(x.shape, x.dtype) for name, x in tree.items()}


def add(a: Tree, b: Tree) -> Tree:
    """a + b, entry by entry."""
    return {name: a[name] + b[name] for name in a}


def subtract(a: Tree, b: Tree) -> Tree:
    """a - b, entry by entry."""
    return {name: a[name] - b[name] for name in a}


def squared_norm(tree: Tree) -> np.float32:
    """The sum of squares of all entries of all tensors."""
    return np.float32(sum(np.sum(x * x) for x in tree.values()))


def is_finite(tree: Tree) -> bool:
    """Whether no entry is NaN or infinite."""
    return all(bool(np.isfinite(x).all()) for x in tree.values())


# A small problem ----------------------------------------------------------------------------------


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
