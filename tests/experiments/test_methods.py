"""The methods get the paper's settings from a configuration, and the table tells the truth."""

import dataclasses
import functools
import subprocess
import sys
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sasg_jax
from experiments.configs import CONFIGS
from experiments.methods import (
    DOWN_RULES,
    EXCHANGES,
    LOOK_EVERY,
    METHODS,
    OPTIMIZERS,
    learning_rate,
    make,
    make_optimizer,
)
from experiments.options import INDICES, VALUES
from sasg_jax import exchanges as library
from sasg_jax.states import find_state

CIFAR = CONFIGS["cifar10_resnet18"]


def test_learning_rate_falls_tenfold_at_the_decay_rounds():
    config = dataclasses.replace(CIFAR, learning_rate=0.1, decay_iterations=(10, 20))
    rate: Any = learning_rate(config)
    assert [float(rate(t)) for t in (0, 9, 11, 19, 21)] == pytest.approx(
        [0.1, 0.1, 0.01, 0.01, 0.001]
    )


def test_learning_rate_warms_up_and_falls_over_all_steps_of_a_worker():
    config = dataclasses.replace(
        CONFIGS["stdlib_lm"], iterations=100, local_steps=10, learning_rate=1.0
    )
    rate: Any = learning_rate(config)
    assert [float(rate(step)) for step in (0, 50, 525, 1000)] == pytest.approx(
        [1 / 50, 1, (1 + 1 / 20) / 2, 1 / 20]
    )


def test_learning_rate_without_decay_is_the_number():
    assert learning_rate(CONFIGS["mnist_fc"]) == 0.05


RECIPES = [name for name, row in METHODS.items() if row.recipe]
OTHERS = [name for name in METHODS if name not in RECIPES]


@pytest.mark.parametrize("name", OTHERS)
def test_methods_send_what_the_table_says(name):
    method = METHODS[name]
    state = find_state(make_optimizer(CONFIGS["mnist_fc"], name).init({"w": jnp.zeros(1000)}))
    # 1,000 entries: 4,000 bytes dense; 10 values of 4 bytes and indices of 2 at 1 %. Coded, 10
    # signs and a magnitude, 10 times 6 low bits, and 10 + 999/64 bits of high ones.
    few = 60 if method.written == ("plain", "plain") else 2 + 4 + 8 + 4
    assert state.wire.num_workers == 10
    assert state.wire.upload_bytes == (few if method.sparse else 4000)
    assert state.wire.upload_paper_bits == 32 * (10 if method.sparse else 1000)
    assert state.wire.flag_bytes == int(method.rule != "always")
    assert state.wire.downlink_bytes == (few if method.two_way else 4000)
    lazy = method.rule != "always"
    exchange = "server" if method.two_way else "lazy" if lazy else "gather"
    assert state.wire.exchange == ("psum" if method.maker == "sgd" else exchange)
    assert bool(state.server.rule) == bool(method.alpha)
    if method.alpha:
        assert len(state.server.rule.history) == 10


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_send_what_their_authors_do(name):
    """In bits that the table of coders gives; each worker hears the messages of all others."""
    config = dataclasses.replace(CONFIGS["stdlib_lm"], learning_rate=0.1)
    params = {"a": jnp.zeros((64, 64)), "b": jnp.zeros(64)}
    state = find_state(make_optimizer(config, name).init(params))
    method = METHODS[name]
    assert state.wire.exchange == (method.exchange or "psum")
    exact = name == "diloco"
    up = state.wire.upload_bytes
    assert up == 4 * 4160 if exact else up < 4 * 4160 / 8
    ledger = sasg_jax.Ledger(state)
    ledger.record(np.ones(4, bool))
    assert ledger.uplink_bytes == 4 * up
    assert ledger.downlink_bytes == 4 * (4 * 4160 if exact else 3 * up)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_may_have_a_sparse_way_down(name):
    config = dataclasses.replace(CONFIGS["stdlib_lm"], down_density=0.1)
    method = make_optimizer(config, name).method
    few = "values='sign', indices='elias_fano'"
    assert method.downlink.name == f"top_k(0.1, scope='tree', {few})"
    assert method.exchange.name == "server"


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [(name, setting, 0.5) for name in RECIPES for setting in METHODS[name].settings],
)
def test_a_setting_of_a_recipe_is_heard(name, setting, value):
    """It makes another program of a training step, unless it is for the data."""
    values: Any = {"local_steps": 7, "inner": "sgd", "values": "sign8", "indices": "bitmap"}
    values |= {"batch_size": 4, "learning_rate": 0.5}  # others are 0.5, too
    other = _program(name, setting, values.get(setting, value))
    assert (other == _program(name)) == (setting == "batch_size")


_BASE = dataclasses.replace(
    CONFIGS["stdlib_lm"], local_steps=3, learning_rate=0.1, density=0.25, down_density=0.25
)


@functools.cache
def _program(name, setting=None, value=None):
    """A step, as text."""
    config = dataclasses.replace(_BASE, **({setting: value} if setting else {}))
    loss = lambda params, batch: sum(jnp.sum((x - batch.mean()) ** 2) for x in params.values())
    direction, tx = make(config, name, loss)
    train_step = sasg_jax.make_train_step(direction, tx, num_workers=4)
    params = {"a": jnp.zeros((16, 16)), "b": jnp.zeros(8)}
    steps = () if direction.steps is None else (direction.steps,)
    state = jax.eval_shape(train_step.init, params)
    return str(jax.make_jaxpr(train_step.step)(state, jnp.zeros((4, *steps, 2))))


@pytest.mark.parametrize("name", METHODS)
def test_a_method_of_every_configuration_is_made_for_the_exchanges_that_suit_it(name):
    for config in CONFIGS.values():
        for exchange in (None, *METHODS[name].exchanges):
            make_optimizer(dataclasses.replace(config, exchange=exchange), name)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", [name for name in OTHERS if not METHODS[name].optimizer])
def test_any_optimizer_may_step_with_the_mean(name, optimizer):
    config = dataclasses.replace(CONFIGS["digits"], optimizer=optimizer)
    inside = make_optimizer(dataclasses.replace(config, optimizer=None), name)
    before = make_optimizer(config, name)
    assert inside.method.learning_rate is not None
    assert before.method.learning_rate is None
    ignored = {"rule"} if name == "sasg_keep" else set()  # whose default holds before momentum
    parts = [dict(tx.method.settings) for tx in (inside, before)]
    assert {key for key in parts[0] if parts[0][key] != parts[1][key]} == ignored


@pytest.mark.parametrize(
    ("name", "setting", "value", "part", "shown"),
    [
        ("turn", "period", 5, "rule", "every(5)"),
        ("turn", "silence", "drop", "silence", "drop"),
        ("sasg", "silence", "keep", "silence", "keep"),
        ("sasg", "scope", "tree", "compressor", "top_k(0.01, scope='tree')"),
        ("turn", "scope", "tensor", "compressor", "top_k(0.01)"),
        ("sparse", "values", "sign4", "compressor", "top_k(0.01, values='sign4')"),
        ("sparse", "indices", "tiled", "compressor", "top_k(0.01, indices='tiled')"),
        ("sasg_coded", "values", "plain", "compressor", "top_k(0.01, indices='elias_fano')"),
        ("turn_two_way", "down_density", 0.1, "downlink", "top_k(0.1, scope='tree')"),
        ("turn_two_way", "down_density", 0.1, "compressor", "top_k(0.01, scope='tree')"),
        ("turn_two_way", "down_period", 3, "downlink_rule", "every(3)"),
        ("sasg", "residual_decay", 0.9, "feedback", "residual(0.9)"),
        ("sasg_keep", "period", 4, "rule", "innovation(max_staleness=4, look_every=16)"),
        ("sparse", "density", 0.1, "compressor", "top_k(0.1)"),
        ("lasg", "max_staleness", 3, "rule", "innovation(max_staleness=3, history=10)"),
    ],
)
def test_a_setting_of_a_method_is_heard(name, setting, value, part, shown):
    config = dataclasses.replace(CONFIGS["digits"], **{setting: value})
    assert setting in METHODS[name].settings
    assert dict(make_optimizer(config, name).method.settings)[part] == shown


def test_a_rule_without_an_alpha_looks_as_seldom_as_the_library_does():
    assert f"look_every={LOOK_EVERY}" in sasg_jax.innovation().name
    assert [METHODS[name].gradients() for name in ("turn", "sasg", "sasg_keep")] == [1, 2, 17 / 16]


def test_local_steps_have_the_rate_in_them():
    """What a worker sends is γ g already, and its steps are counted as gradients."""
    config = dataclasses.replace(CONFIGS["digits"], local_steps=4, decay_iterations=(100,))
    for name in ("sgd", "local_coded", "sasg_keep"):
        assert "local_steps" in METHODS[name].settings
        assert make_optimizer(config, name).method.learning_rate == 1
    assert "local_steps" not in METHODS["sasg"].settings
    assert (METHODS["turn"].gradients(4), METHODS["sasg_keep"].gradients(4)) == (4, 4 * 17 / 16)
    rate: Any = learning_rate(config)
    assert [float(rate(step)) for step in (399, 401)] == pytest.approx([0.1, 0.01])


@pytest.mark.parametrize("rule", DOWN_RULES[1:])
def test_the_server_sends_as_often_by_any_rule(rule):
    config = dataclasses.replace(CONFIGS["digits"], down_period=4, down_rule=rule)
    made = make_optimizer(config, "sasg_coded").method.downlink_rule
    assert made.name.startswith(f"held_rate(0.25, {rule}(max_staleness=16")


def test_the_exchanges_are_the_librarys():
    assert set(EXCHANGES) == set(library.EXCHANGES)


def test_the_coders_are_the_librarys():
    assert get_args(INDICES) == tuple(sasg_jax.coders.INDEX_CODERS)
    assert get_args(VALUES) == tuple(sasg_jax.coders.VALUE_CODERS)


def test_the_table_needs_no_jax():
    code = "import sys, experiments.methods; assert not {'jax', 'optax'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
