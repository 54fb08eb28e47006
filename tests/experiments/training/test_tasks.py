"""What is trained, and how it is measured."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import data
from experiments.configs import CONFIGS
from experiments.data import Text
from experiments.training.models import Transformer
from experiments.training.tasks import Bytes, Images, make_task

LM = dataclasses.replace(CONFIGS["stdlib_lm"], width=32, context=8)


@pytest.fixture(scope="module")
def text():
    rng = np.random.default_rng(0)
    windows = rng.integers(0, 256, (5, 9)).astype(np.uint8)
    return Text("random", windows, windows, np.array([8, 8, 8, 8, 3], np.int32))


def test_the_task_is_that_of_the_data(text):
    assert isinstance(make_task(LM, text), Bytes)
    assert isinstance(make_task(CONFIGS["digits"], data.load("digits")), Images)


def test_bits_are_those_of_the_probabilities_of_the_bytes_that_are_there(text):
    """In NumPy, from the model's own logits; what fills up the last window counts for nothing."""
    task = Bytes(LM, text)
    params, _ = task.init(jax.random.key(0))
    params = jax.tree.map(lambda x: 20 * x if x.ndim == 2 else x, params)  # not all alike
    logits = Transformer(32).apply({"params": params}, jnp.int32(text.test_windows[:, :-1]))
    logits = np.asarray(logits, np.float64)
    bits = 0.0
    for row, length in enumerate(text.test_lengths):
        for place in range(length):
            of_all = np.exp(logits[row, place] - logits[row, place].max())
            bits -= np.log2(of_all[text.test_windows[row, place + 1]] / of_all.sum())
    score = task.score(params, {}, text.test_windows, text.test_lengths)
    np.testing.assert_allclose(score, bits, rtol=1e-5)
    whole = text.test_windows[:4]
    loss = task.loss(params, (jnp.asarray(whole),))
    of_whole = task.score(params, {}, whole, text.test_lengths[:4])
    np.testing.assert_allclose(loss / np.log(2), of_whole / 32, rtol=1e-5)


def test_a_model_that_knows_nothing_takes_eight_bits(text):
    task = Bytes(LM, text)
    params, _ = task.init(jax.random.key(0))
    zeros = jax.tree.map(jnp.zeros_like, params)
    score = task.score(zeros, {}, text.test_windows, text.test_lengths)
    np.testing.assert_allclose(score, 8 * text.test_weight, rtol=1e-5)
