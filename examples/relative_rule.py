"""A rule without units: a worker sends when its gradient has changed by a part of itself.

It compares with the gradient at the parameters of its last upload, on the same batch, and sends
when ‖g - g'‖² > θ‖g‖². No learning rate and no number of workers enters θ.
"""

import jax.numpy as jnp
import numpy as np
import optax

import sasg_jax


def relative(theta, max_staleness=10):
    """Sends where ‖g - g'‖² > θ‖g‖², and at the latest after ``max_staleness`` rounds."""
    squared_norm = lambda tree: optax.tree.norm(tree, squared=True)

    def decide(view):
        again = view.reevaluate(view.memory)
        change = squared_norm(optax.tree.sub(view.direction, again))
        size = squared_norm(view.direction)
        # Written so that what is not a number is sent, looked at, and refused.
        ratio = change / jnp.where(size == 0, 1, size)
        return sasg_jax.Decision(~(change <= theta * size), ratio)

    return sasg_jax.Rule(
        name=f"relative({theta:g})",
        decide=decide,
        max_staleness=max_staleness,
        silence="keep",
        init_worker=lambda params: params,
        begin=lambda shared, round: (jnp.float32(theta), shared),
        sent=lambda memory, params, direction, learning_rate: params,
    )


def main():
    tx = sasg_jax.pipeline(
        sasg_jax.aggregate(sasg_jax.top_k(0.25), relative(0.01), num_workers=4), optax.adam(0.05)
    )
    loss_fn = lambda params, x: jnp.mean((x @ params["w"] - x.sum(1)) ** 2)
    train_step = sasg_jax.make_train_step(loss_fn, tx, num_workers=4)
    state = train_step.init({"w": jnp.zeros(20)})
    ledger = sasg_jax.Ledger(state.opt_state)
    batches = np.random.default_rng(0).normal(size=(200, 4, 8, 20))
    for batch in batches:
        state, info = train_step.step(state, batch)
        ledger.record(info.uploaded)
    loss = loss_fn(state.params, batches[0, 0])
    print(f"loss {loss:.1e} for {ledger.uploads} uploads in {ledger.rounds} rounds")


if __name__ == "__main__":
    main()
