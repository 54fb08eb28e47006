"""A compressor with a key: QSGD, which rounds to a few levels at random.

The level of an entry is s|x| / ‖x‖, rounded up or down so that it is right in the mean: no residual
need be kept. A message is one float and a byte for each entry. (https://arxiv.org/abs/1610.02132)
"""

import jax
import jax.numpy as jnp
import numpy as np

import sasg_jax


def qsgd(levels=7):
    """Sends the norm of every tensor, and for each entry a sign and one of ``levels`` steps."""

    def quantise(x, key):
        norm = jnp.linalg.norm(x.astype(jnp.float32))
        level = levels * jnp.abs(x) / jnp.where(norm == 0, 1, norm)
        level = jnp.floor(level + jax.random.uniform(key, x.shape))  # up as often as is right
        return norm, (jnp.sign(x) * level).astype(jnp.int8)

    decode = lambda norm, rounded: norm * rounded / levels

    def compress(tree, memory, key):
        leaves, treedef = jax.tree.flatten(tree)
        messages = list(map(quantise, leaves, jax.random.split(key, len(leaves))))
        rest = map(lambda x, sent: (x - decode(*sent)).astype(x.dtype), leaves, messages)
        return sasg_jax.Compressed(messages, treedef.unflatten(rest), memory)

    def decompress_sum(messages, like, key):
        sums = [jax.vmap(decode)(*rows).sum(0) for rows in messages]
        return jax.tree.unflatten(jax.tree.structure(like), sums)

    return sasg_jax.Compressor(
        name=f"qsgd({levels})",
        compress=compress,
        decompress_sum=decompress_sum,
        num_values=lambda tree: sum(x.size for x in jax.tree.leaves(tree)),
        unbiased=True,
        random=True,
    )


def main():
    tx = sasg_jax.compressed_sgd(0.1, qsgd(), num_workers=4, key=jax.random.key(0))
    loss_fn = lambda params, x: jnp.mean((x @ params["w"] - x.sum(1)) ** 2)
    train_step = sasg_jax.make_train_step(loss_fn, tx, num_workers=4)
    state = train_step.init({"w": jnp.zeros(20)})
    ledger = sasg_jax.Ledger(state.opt_state)
    batches = np.random.default_rng(0).normal(size=(100, 4, 8, 20))
    for batch in batches:
        state, info = train_step.step(state, batch)
        ledger.record(info.uploaded)
    print(f"loss {loss_fn(state.params, batches[0, 0]):.1e} for {ledger.uplink_bytes} bytes up")


if __name__ == "__main__":
    main()
