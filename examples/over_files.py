"""A run whose halves are joined by files in a shared folder, in place of collectives.

Each process is one worker: it writes its message, waits for those of the others, and makes the
server's half for itself. A silent worker's file is empty.
"""

import pathlib
import tempfile
import time
from multiprocessing import get_context

import jax
import jax.numpy as jnp
import numpy as np

import sasg_jax


def exchange(paths, m, post):
    """Writes what worker m has for the others, and reads what all have: a row for each."""
    leaves, treedef = jax.tree.flatten(post)
    unfinished = paths[m].with_suffix(".unfinished.npz")
    np.savez(unfinished, *(leaves if post.uploaded else []))
    unfinished.rename(paths[m])  # at once: nobody reads half a file
    posts = []
    for path in paths:
        while not path.exists():
            time.sleep(0.001)
        with np.load(path) as file:
            posts.append(treedef.unflatten(list(file.values()) or map(np.zeros_like, leaves)))
    return jax.tree.map(lambda *rows: np.stack(rows), *posts)


def train(m, folder, rounds=50):
    """Worker m's run of SASG on a small problem."""
    parts = sasg_jax.top_k(0.25), sasg_jax.innovation(alpha=10)
    method = sasg_jax.make_method(*parts, num_workers=2, learning_rate=0.1)
    w, rng = jnp.zeros(20), np.random.default_rng(m)
    worker, server = sasg_jax.init_worker(method, w), sasg_jax.init_server(method, w)
    ledger = sasg_jax.Ledger(sasg_jax.AggregateState(worker, server, method.wire(w)))

    @jax.jit
    def half(worker, server, w, x):
        at = jax.grad(lambda w: jnp.mean((x @ w - x.sum(1)) ** 2))
        return sasg_jax.worker_half(method, worker, server, at(w), w, index=m, reevaluate=at)

    for t in range(rounds):
        worker, post = half(worker, server, w, rng.normal(size=(8, 20)))
        posts = exchange([pathlib.Path(folder, f"{t}-{i}.npz") for i in range(2)], m, post)
        step, server = jax.jit(sasg_jax.server_half, static_argnums=0)(method, server, *posts, w)
        w -= step
        ledger.record(posts.uploaded)
    return w, ledger


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, get_context("spawn").Pool(2) as processes:
        for w, ledger in processes.starmap(train, [(0, folder), (1, folder)]):
            print(f"w[0] {w[0]:.4f} after {ledger.uplink_bytes} bytes up")
