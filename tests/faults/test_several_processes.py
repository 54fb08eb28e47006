"""Several processes: replicas that are none, uneven numbers of devices, and counting."""

import os
import pathlib
import socket
import subprocess
import sys

import pytest

import sasg_jax

pytestmark = pytest.mark.processes
ROOT = pathlib.Path(sasg_jax.__file__).parent.parent

# What every program begins with. A process has as many devices as it is told.
START = """
import os, sys
process, port, devices = int(sys.argv[1]), sys.argv[2], sys.argv[3]
os.environ["XLA_FLAGS"] += f" --xla_force_host_platform_device_count={devices}"
import jax, jax.numpy as jnp, numpy as np, sasg_jax
jax.distributed.initialize(f"127.0.0.1:{port}", 2, process)
M = jax.device_count()

def tell(*words):
    print("TOLD", *words, flush=True)

def loss(params, batch, **given):
    value = jnp.sum((params["w"] - batch.mean()) ** 2)
    return (value, given["model_state"]) if "model_state" in given else value
"""


def _run(program, devices=(1, 1), expected_status=0):
    """What each of two processes tells."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    started = [
        subprocess.Popen(
            [sys.executable, "-c", START + program, str(process), port, str(count)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"},
        )
        for process, count in enumerate(devices)
    ]
    told = []
    try:
        for process in started:
            output, errors = process.communicate(timeout=120)
            assert process.returncode == expected_status, errors
            lines = output.splitlines()
            told.append([x.removeprefix("TOLD ") for x in lines if x.startswith("TOLD ")])
    finally:
        for process in started:
            process.kill()
            process.communicate()
    return told


def test_what_differs_between_processes_from_the_start_is_refused_in_all():
    """Parameters, their shapes, a model state, and a key; NaN is equal to itself."""
    first, second = _run("""
def attempt(name, params, model_state=(), key=None):
    has = {"has_model_state": model_state != (), "has_key": key is not None}
    tx = sasg_jax.sasg(0.05, num_workers=M, density=0.5)
    train_step = sasg_jax.make_train_step(loss, tx, num_workers=M, driver="shard_map", **has)
    try:
        train_step.init(params, model_state, key)
        tell(name, "taken")
    except ValueError as error:
        tell(name, "refused", "differ from those of process 0" in str(error))

attempt("same", {"w": jnp.array([1.0, jnp.nan])}, {"n": 0, "m": np.zeros(2)}, jax.random.key(0))
attempt("params", {"w": jnp.zeros(4) + process})
attempt("one entry", {"w": np.array([0, 0, 1e-30 * process], np.float32)})
attempt("shape", {"w": jnp.zeros(4 + process)})
attempt("type", {"w": jnp.zeros(4 * (1 + process), [jnp.float32, jnp.float16][process])})
attempt("model state", {"w": jnp.zeros(4)}, {"n": np.full(2, process)})
attempt("key", {"w": jnp.zeros(4)}, key=jax.random.key(process))
attempt("old key", {"w": jnp.zeros(4)}, key=jax.random.PRNGKey(process))
""")
    refused = ["params", "one entry", "shape", "type", "model state", "key", "old key"]
    assert first == ["same taken", *(f"{name} refused True" for name in refused)]
    assert second == first


def test_processes_with_different_numbers_of_devices_train_as_one():
    """One worker here and three there: the parameters and the bytes are those of a simulation."""
    first, second = _run(
        """
tx = sasg_jax.sasg(0.05, num_workers=M, density=0.5, history=2)
mesh = jax.sharding.Mesh(jax.devices(), ("workers",))
split = jax.NamedSharding(mesh, jax.P("workers"))
batches = np.random.default_rng(0).normal(size=(8, M, 2)).astype(np.float32)
present = np.array([[True] * M] * 4 + [[True, False, True, True]] * 4)

def train(driver):
    train_step = sasg_jax.make_train_step(loss, tx, num_workers=M, driver=driver)
    state = train_step.init({"w": jnp.arange(4.0)})
    ledger = sasg_jax.Ledger(state.opt_state)
    for t in range(8):
        batch = batches[t]
        if driver == "shard_map":
            lies = lambda index: batches[t][index]
            batch = jax.make_array_from_callback(batches[t].shape, split, lies)
        state, info = train_step.step(state, batch, present[t])
        jax.block_until_ready(state)
        ledger.record(info.uploaded, present[t])
    local = state.params["w"].addressable_data(0)
    return np.asarray(local), ledger.to_dict()

(here, counted), (simulated, expected) = train("shard_map"), train("vmap")
np.testing.assert_allclose(here, simulated, rtol=1e-5)
assert counted == expected, (counted, expected)
assert 8 < sum(counted["uploads_by_worker"]) < 8 * M
tell(here.tobytes().hex(), counted["uploads_by_worker"])
""",
        devices=(1, 3),
    )
    assert len(first) == 1
    assert second == first


def test_a_driver_for_one_process_is_refused():
    first, second = _run("""
tx = sasg_jax.sgd(0.05, num_workers=M)
try:
    sasg_jax.make_train_step(loss, tx, num_workers=M, driver="pmap")
except ValueError as error:
    tell(error)
""")
    assert first == second
    assert first[0].startswith("Expected driver='pmap' to be 'shard_map'")
