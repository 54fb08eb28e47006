"""A state goes on with the optimiser that it was made for, or an error names what differs.

So a ledger of the state counts what the optimiser in use sends.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from problems import M

import sasg_jax

PARAMS = {"w": jnp.ones(8)}
BATCH = np.ones((M, 2), np.float32)
DRIVERS = ({}, {"chunk_size": 2}, {"driver": "shard_map"}, {"driver": "pmap"})


def _loss(params, batch):
    return jnp.sum((params["w"] - batch.mean()) ** 2)


def _ours(density=0.5, num_workers=M, scope="tensor", **options):
    rule = {
        name: options.pop(name)
        for name in ("history", "max_staleness", "share_stale_params")
        if name in options
    }
    return sasg_jax.compressed_sgd(
        options.pop("learning_rate", 0.1),
        sasg_jax.top_k(density, scope=scope),
        sasg_jax.innovation(options.pop("alpha", 1.0), **rule),
        num_workers=num_workers,
        **options,
    )


OTHERS = {
    "density": (_ours(density=0.25), r"compressor=top_k\(0.25\)"),
    "scope": (_ours(scope="tree"), "scope='tree'"),
    "history": (_ours(history=3), "history=3"),
    "max_staleness": (_ours(max_staleness=3), "max_staleness=3"),
    "share_stale_params": (_ours(share_stale_params=True), "share_stale_params=True"),
    "rule": (sasg_jax.sparse_sgd(0.1, num_workers=M, density=0.5), r"rule=always\(\)"),
    "exchange": (_ours(exchange="relay"), "exchange=relay"),
    "silence": (_ours(silence="drop"), "silence=drop"),
    "decay": (_ours(feedback=sasg_jax.residual(0.9)), r"feedback=residual\(0.9\)"),
    "feedback": (_ours(feedback=sasg_jax.reconstruction()), r"feedback=reconstruction\(\)"),
    "downlink": (
        _ours(exchange="server", downlink=sasg_jax.top_k(0.5)),
        r"downlink=top_k\(0.5\)",
    ),
    "a pipeline": (sasg_jax.pipeline(optax.identity(), _ours()), "PipelineState, got"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_optimiser_is_named_in_ones_own_loop(name):
    tx, named = OTHERS[name]
    run = problems.start(_ours(), PARAMS)
    step = problems.map_workers(tx, run, loss=_loss)
    with pytest.raises(
        ValueError, match=rf"^Expected a state that this optimiser has made.*{named}"
    ):
        jax.eval_shape(step, run, BATCH)


def test_another_order_in_a_chain_is_named():
    run = problems.start(optax.chain(optax.trace(0.9), _ours()), PARAMS)
    step = problems.map_workers(optax.chain(_ours(), optax.trace(0.9)), run, loss=_loss)
    with pytest.raises(ValueError, match="AggregateState, got one of TraceState"):
        jax.eval_shape(step, run, BATCH)


@pytest.mark.parametrize("options", DRIVERS, ids=str)
@pytest.mark.parametrize("name", ["density", "exchange", "silence", "history"])
def test_another_optimiser_is_named_by_every_driver(name, options):
    tx, named = OTHERS[name]
    state = sasg_jax.make_train_step(_loss, _ours(), num_workers=M).init(PARAMS)
    train_step = sasg_jax.make_train_step(_loss, tx, num_workers=M, **options)
    with pytest.raises(
        ValueError, match=rf"^Expected a state that this optimiser has made.*{named}"
    ):
        train_step.step(state, BATCH)


@pytest.mark.parametrize("options", DRIVERS, ids=str)
def test_another_number_of_workers_is_named(options):
    state = sasg_jax.make_train_step(_loss, _ours(), num_workers=M).init(PARAMS)
    train_step = sasg_jax.make_train_step(_loss, _ours(num_workers=2), num_workers=2, **options)
    with pytest.raises(ValueError, match=r"^Expected num_workers=2 to be that of the state, 4"):
        train_step.step(state, BATCH[:2])


def test_rates_and_weights_may_change():
    """They are no part of what a state holds."""
    run = problems.start(_ours(), PARAMS)
    other = _ours(learning_rate=optax.constant_schedule(0.5), alpha=7.0)
    jax.eval_shape(problems.map_workers(other, run, loss=_loss), run, BATCH)
