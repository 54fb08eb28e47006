"""Eight CPU devices for the drivers that need several, and no silent rank promotion."""

import atexit
import importlib.metadata
import os
import shutil
import signal
import tempfile

# A shell's background jobs ignore Ctrl-C, and what they start inherits that; tests interrupt it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Read when jax starts its backend. Code that is compiled fast rather than well takes a quarter of
# the time that the tests would take. What XLA_FLAGS already says wins: the compiler that users have
# is "--xla_backend_optimization_level=3 --xla_cpu_use_fusion_emitters=true".
_FLAGS = [
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
]
if importlib.metadata.version("jaxlib").startswith("0.10."):  # others abort at a flag of no use
    _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([*_FLAGS, os.environ.get("XLA_FLAGS", "")])
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# What one process of a run has compiled, those that it starts need not compile again.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="sasg_jax_tests_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_xdist_auto_num_workers(config):
    """All tests of every day are shared out between processes, file by file. One file is not worth
    their start, and what has processes of its own or looks at the clock has the machine to itself.
    """
    everything = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    is_daily = config.option.markexpr in config.getini("addopts")  # no -m has been given
    return min(os.cpu_count() or 1, 8) if everything and is_daily else 0


@pytest.fixture(scope="module", autouse=True)
def _forget_compiled_code():
    """Compiled code is rarely of use to another module; keeping it only takes memory."""
    yield
    jax.clear_caches()
