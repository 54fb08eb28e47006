"""The library's own tests refuse implicit rank promotion; flax's layers and the loss use it."""

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def allow_rank_promotion():
    with jax.numpy_rank_promotion("allow"):
        yield
