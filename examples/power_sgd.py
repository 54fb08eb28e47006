"""A compressor with a mean inside: PowerSGD, low rank by one step of power iteration.

The matrices X of all workers become P = orthogonal(mean X Q), then Q = mean Xᵀ P, and the mean of X
is taken to be P Qᵀ. Q is the memory, from which the next round starts. (arXiv 1905.13727)
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import sasg_jax


def power_sgd(rank):
    """Sends two thin factors of every matrix, and vectors as they are."""

    def init_memory(tree):
        key = jax.random.key(0)  # the same on all workers
        return [
            jax.random.normal(jax.random.fold_in(key, i), (x.shape[1], min(rank, *x.shape)))
            for i, x in enumerate(jax.tree.leaves(tree))
            if x.ndim == 2
        ]

    def compress_mean(tree, memory, key, mean):
        leaves, treedef = jax.tree.flatten(tree)
        matrices = [x.astype(jnp.float32) for x in leaves if x.ndim == 2]
        vectors = [x for x in leaves if x.ndim != 2]
        left, vectors = mean((list(map(jnp.matmul, matrices, memory)), vectors))
        left = [jnp.linalg.qr(p)[0] for p in left]
        right = mean([x.T @ p for x, p in zip(matrices, left, strict=True)])
        products, vectors = map(lambda p, q: p @ q.T, left, right), iter(vectors)
        decoded = [next(products if x.ndim == 2 else vectors).astype(x.dtype) for x in leaves]
        rest = map(lambda x, y: x - y if x.ndim == 2 else jnp.zeros_like(x), leaves, decoded)
        return sasg_jax.Compressed(treedef.unflatten(decoded), treedef.unflatten(rest), right)

    return sasg_jax.Compressor(
        name=f"power_sgd({rank})", init_memory=init_memory, compress_mean=compress_mean
    )


def main():
    tx = sasg_jax.pipeline(
        sasg_jax.aggregate(power_sgd(2), num_workers=4), optax.sgd(0.1, momentum=0.9)
    )
    loss_fn = lambda params, x: jnp.mean((x @ params["w"] - x[:, ::-1]) ** 2)
    train_step = sasg_jax.make_train_step(loss_fn, tx, num_workers=4)
    state = train_step.init({"w": jnp.zeros((20, 20))})
    ledger = sasg_jax.Ledger(state.opt_state)
    batches = np.random.default_rng(0).normal(size=(200, 4, 8, 20))
    for batch in batches:
        state, info = train_step.step(state, batch)
        ledger.record(info.uploaded)
    print(f"loss {loss_fn(state.params, batches[0, 0]):.1e} for {ledger.uplink_bytes} bytes up")


if __name__ == "__main__":
    main()
