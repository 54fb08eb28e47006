"""Lazily aggregated gradients (LAG): both sides keep what a worker has sent, and it sends changes.

Worker m has sent h so far, and sends g - h when ‖g - h‖² ≥ ξ/(γ²M²) Σ_d ‖w_{t+1-d} - w_{t-d}‖² over
the last D steps. One gradient a round, of all its data: the noise of small batches would never fall
below the threshold. (Chen et al., arXiv 1805.09965)
"""

import jax.numpy as jnp
import numpy as np
import optax

import sasg_jax


def lag(xi, learning_rate, history=10):
    """Sends where the gradient is further from what was sent than recent steps would explain."""

    def begin(shared, round):
        previous, steps = shared
        moved = optax.tree.norm(optax.tree.sub(round.params, previous), squared=True)
        steps = jnp.append(steps[1:], moved)
        threshold = xi / (learning_rate * round.num_workers) ** 2 * steps.sum()
        return threshold, (round.params, steps)

    def decide(view):
        change = optax.tree.sub(view.direction, view.feedback.reconstruction)
        change = optax.tree.norm(change, squared=True)
        return sasg_jax.Decision(~(change < view.threshold), change)

    return sasg_jax.Rule(
        name=f"lag({xi:g}, {learning_rate:g}, history={history})",
        decide=decide,
        init_shared=lambda params: (params, jnp.zeros(history)),
        begin=begin,
    )


def main():
    tx = sasg_jax.pipeline(
        sasg_jax.aggregate(
            sasg_jax.identity(), lag(0.1, 0.1), feedback=sasg_jax.reconstruction(), num_workers=4
        ),
        optax.sgd(0.1),
    )
    loss_fn = lambda params, x: jnp.mean((x @ params["w"] - x.sum(1)) ** 2)
    train_step = sasg_jax.make_train_step(loss_fn, tx, num_workers=4)
    state = train_step.init({"w": jnp.zeros(20)})
    batch = np.random.default_rng(0).normal(size=(4, 40, 20))
    ledger = sasg_jax.Ledger(state.opt_state)
    for _ in range(100):
        state, info = train_step.step(state, batch)
        ledger.record(info.uploaded)
    loss = loss_fn(state.params, batch[0])
    print(f"loss {loss:.1e} for {ledger.uploads} uploads in {ledger.rounds} rounds")


if __name__ == "__main__":
    main()
