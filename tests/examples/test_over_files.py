"""The run over files against a NumPy loop, in two threads. (test_examples: in two processes.)"""

import concurrent.futures

import numpy as np
import oracle

from examples import over_files

ROUNDS = 25


def _loop():
    """Both workers' runs, in one NumPy loop: parameters, and who uploaded."""
    rngs = [np.random.default_rng(m) for m in range(2)]
    batches = [[rng.normal(size=(8, 20)).astype(np.float32) for _ in range(50)] for rng in rngs]

    def grad(worker, round, params):
        x = batches[worker][round]
        return {"w": 2 * x.T @ (x @ params["w"] - x.sum(1)) / 8}

    return oracle.train(
        grad,
        {"w": np.zeros(20, np.float32)},
        num_workers=2,
        rounds=ROUNDS,
        learning_rate=0.1,
        density=0.25,
        alpha=10,
    )


def test_equals_a_loop(tmp_path):
    """Both workers have the same parameters, and a silent one's file has no message."""
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        runs = [threads.submit(over_files.train, m, tmp_path, ROUNDS) for m in range(2)]
        (first, ledger), (second, _) = (run.result(timeout=120) for run in runs)
    trace = _loop()
    assert 2 * 10 < trace.uploaded.sum() < 2 * ROUNDS  # the first ten rounds are forced
    np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(first, trace.params["w"], rtol=1e-4, atol=1e-6)
    assert ledger.uploads_by_worker == trace.uploaded.sum(0).tolist()
    for (t, m), uploaded in np.ndenumerate(trace.uploaded):
        with np.load(tmp_path / f"{t}-{m}.npz") as file:
            assert bool(file.files) == uploaded
    assert not list(tmp_path.glob("*unfinished*"))
