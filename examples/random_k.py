"""A compressor with a shared seed, whose messages add up: random-k.

All workers draw the same entries, from a key that nobody sends: no index crosses the wire, and one
sum over workers takes the place of a gather. What is left out goes into the residual.
"""

import jax
import jax.numpy as jnp
import numpy as np

import sasg_jax


def random_k(density):
    """Sends the same random entries of every tensor from every worker, without their indices."""

    def draw(tree, key):
        """Which entries of each tensor."""
        sizes = [x.size for x in jax.tree.leaves(tree)]
        draws = zip(sizes, jax.random.split(key, len(sizes)), strict=True)
        kept = lambda size: (max(1, int(density * size)),)
        return [jax.random.choice(k, size, kept(size), replace=False) for size, k in draws]

    def compress(tree, memory, key):
        leaves, treedef = jax.tree.flatten(tree)
        indices = draw(tree, key)
        values = [x.ravel()[i] for x, i in zip(leaves, indices, strict=True)]
        rest = map(lambda x, i: x.ravel().at[i].set(0).reshape(x.shape), leaves, indices)
        return sasg_jax.Compressed(values, treedef.unflatten(rest), memory)

    def decompress_sum(messages, like, key):
        leaves, treedef = jax.tree.flatten(like)
        put = lambda x, i, rows: jnp.zeros(x.size).at[i].set(rows.sum(0)).reshape(x.shape)
        return treedef.unflatten(map(put, leaves, draw(like, key), messages))

    return sasg_jax.Compressor(
        name=f"random_k({density:g})",
        compress=compress,
        decompress_sum=decompress_sum,
        linear=True,
        random=True,
        shares_key=True,
    )


def main():
    tx = sasg_jax.compressed_sgd(0.1, random_k(0.25), num_workers=4, key=jax.random.key(0))
    loss_fn = lambda params, x: jnp.mean((x @ params["w"] - x.sum(1)) ** 2)
    train_step = sasg_jax.make_train_step(loss_fn, tx, num_workers=4)
    state = train_step.init({"w": jnp.zeros(20)})
    ledger = sasg_jax.Ledger(state.opt_state)
    batches = np.random.default_rng(0).normal(size=(200, 4, 8, 20))
    for batch in batches:
        state, info = train_step.step(state, batch)
        ledger.record(info.uploaded)
    print(f"loss {loss_fn(state.params, batches[0, 0]):.1e} for {ledger.uplink_bytes} bytes up")


if __name__ == "__main__":
    main()
