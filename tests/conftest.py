"""Eight CPU devices for the drivers that need several, and no silent rank promotion."""

import os
import signal

# A shell's background jobs ignore Ctrl-C, and what they start inherits that; tests interrupt it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Read when jax starts its backend. Code that is compiled fast rather than well halves the time
# that the tests take.
_FLAGS = ("--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_FLAGS])
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module", autouse=True)
def _forget_compiled_code():
    """Compiled code is not shared between modules; keeping it only takes memory."""
    yield
    jax.clear_caches()
