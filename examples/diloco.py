"""DiLoCo: many steps of AdamW by each worker alone, then one of Nesterov's with their mean way.

Every worker keeps the state of its AdamW from round to round. The way that it went, old minus new
parameters, is what it sends; the outer optimiser takes the mean for a gradient.

Reference: Douillard et al., DiLoCo, https://arxiv.org/abs/2311.08105, 2023
"""

import jax.numpy as jnp
import numpy as np
import optax

import sasg_jax


def diloco(loss_fn, *, num_workers, steps, inner=None):
    """A training step whose batches have two leading axes: workers, and steps of a round."""
    way = sasg_jax.local_steps(loss_fn, optax.adamw(4e-4) if inner is None else inner, steps=steps)
    tx = sasg_jax.pipeline(
        sasg_jax.aggregate(sasg_jax.identity(), num_workers=num_workers),
        optax.sgd(0.7, momentum=0.9, nesterov=True),
    )
    return sasg_jax.make_train_step(way, tx, num_workers=num_workers)


def main():
    loss_fn = lambda params, x: jnp.mean((x @ params["w"] - x.sum(1)) ** 2)
    train_step = diloco(loss_fn, num_workers=4, steps=10, inner=optax.adamw(0.02))
    state = train_step.init({"w": jnp.zeros(20)})
    ledger = sasg_jax.Ledger(state.opt_state)
    batches = np.random.default_rng(0).normal(size=(30, 4, 10, 8, 20))
    for batch in batches:
        state, info = train_step.step(state, batch)
        ledger.record(info.uploaded)
    gradients = 10 * ledger.uploads
    loss = loss_fn(state.params, batches[0, 0, 0])
    print(f"loss {loss:.1e} for {ledger.uploads} messages of {gradients} gradients")


if __name__ == "__main__":
    main()
