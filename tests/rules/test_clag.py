"""CLAG's rule beside a loop written from its formula."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import recipes

import sasg_jax
from sasg_jax.rules.clag import Last

ROUNDS, RATE = 40, 0.1


def top(x, kept):
    """The entries of largest magnitude, of the whole vector."""
    chosen = np.argsort(-np.abs(x), kind="stable")[:kept]
    return np.where(np.isin(np.arange(x.size), chosen), x, 0)


def _loop(given, zeta, kept, cap=None, present=None):
    """h ← h + C(x - h) if ‖x - h‖² > ζ‖x - y‖²; w loses γ times the mean of all h."""
    rounds, num_workers = given.targets.shape[:2]
    w, path = recipes.start(), [recipes.start()]
    h, y, last = np.zeros((num_workers, recipes.SIZE)), [None] * num_workers, [-1] * num_workers
    uploaded, compare = np.zeros((rounds, num_workers), bool), recipes.compared()
    for t in range(rounds):
        for m in range(num_workers):
            x = given.grad(t, m, w)
            if not np.isfinite(x).all() or (present is not None and not present[t, m]):
                continue  # y stays, too
            forced = y[m] is None or (cap is not None and t - last[m] >= cap)
            lacks = recipes.squared(x - h[m])
            if forced or compare(lacks, zeta * recipes.squared(x - y[m])):
                h[m], uploaded[t, m], last[m] = h[m] + top(x - h[m], kept), True, t
            y[m] = x
        w = w - RATE * h.mean(0)
        path.append(w)
    return np.array(path), uploaded, compare


def _tx(zeta, num_workers, density=None, cap=None):
    compressor = sasg_jax.identity()
    if density:
        compressor = sasg_jax.top_k(density, scope="tree")
    rule = sasg_jax.clag_rule(zeta, max_staleness=cap)
    ours = sasg_jax.aggregate(compressor, rule, num_workers=num_workers)
    return sasg_jax.pipeline(ours, optax.sgd(RATE))


@pytest.mark.parametrize(
    ("num_workers", "zeta", "kept", "cap"),
    [(1, 2.0, 5, None), (4, 6.0, 5, 5), (4, 16.0, 2, None), (4, 0.0, 2, None)],
)
def test_equals_a_loop(num_workers, zeta, kept, cap):
    """With ζ = 0 that is EF21: all upload always."""
    given = recipes.data(num_workers, ROUNDS)
    path, uploaded, compare = _loop(given, zeta, kept, cap)
    assert zeta == 0 or compare.margin > 1e-3
    assert zeta == 0 or 0.2 < uploaded.mean() < 0.8
    density = None if kept == 5 else kept / 5
    run = recipes.run(_tx(zeta, num_workers, density, cap), given)
    np.testing.assert_array_equal(run.uploaded, uploaded)
    np.testing.assert_allclose(run.threshold, zeta)
    recipes.assert_same_path(run, path)
    assert zeta != 0 or uploaded.all()


def test_absent_and_refused():
    """The last gradient of a worker is then still that of the round before."""
    given = recipes.data(4, ROUNDS, noise=0.02)
    present = np.random.default_rng(1).random((ROUNDS, 4)) < 0.7
    present[0, 1] = False
    given.targets[[0, 5, 12], [0, 2, 3], 0] = np.nan
    path, uploaded, compare = _loop(given, 6.0, 5, present=present)
    assert compare.margin > 1e-3
    run = recipes.run(_tx(6.0, 4), given, present=present)
    np.testing.assert_array_equal(run.uploaded, uploaded)
    recipes.assert_same_path(run, path)


def _decide(lacks, last, zeta=1.0, started=True):
    tree = lambda x: jax.tree.map(lambda p: jnp.full_like(p, x), recipes.params())
    h = sasg_jax.Reconstruction(tree(8.0))
    memory = Last(tree(last), jnp.asarray(started))
    seen = recipes.view(
        tree(0.0), pending=tree(lacks), feedback=h, memory=memory, threshold=jnp.float32(zeta)
    )
    return sasg_jax.clag_rule(zeta).decide(seen)


def test_what_equals_its_bound_is_silent():
    """x is 8 + 2, and was 8: a change of 2 for 2 that are lacking."""
    assert not _decide(2.0, 8.0).upload
    assert _decide(2.0, 8.25).upload
    assert _decide(2.0, 8.0).measured == 1


def test_the_first_round_and_what_is_no_number_upload():
    """And where nothing is lacking and nothing changes, nothing is said."""
    assert _decide(2.0, 8.0, zeta=1e30, started=False).upload
    assert _decide(jnp.nan, 8.0, zeta=1e30).upload
    assert _decide(2.0, 10.0, zeta=1e30).upload
    assert not _decide(0.0, 8.0, zeta=0.0).upload


def test_needs_to_know_what_the_server_has():
    make = lambda **how: sasg_jax.make_method(rule=sasg_jax.clag_rule(), num_workers=2, **how)
    assert make().feedback.name == "reconstruction()"
    with pytest.raises(ValueError, match=r"^Expected feedback='residual\(\)' to be reconstruction"):
        make(feedback=sasg_jax.residual())
    down = {"downlink": sasg_jax.top_k(0.1), "downlink_rule": sasg_jax.clag_rule()}
    with pytest.raises(ValueError, match=r"^Expected downlink_rule=.* to be one that needs no rec"):
        sasg_jax.make_method(num_workers=2, **down)


def test_names_and_bad_arguments():
    assert sasg_jax.clag_rule().name == "clag_rule()"
    assert sasg_jax.clag_rule(max_staleness=7).name == "clag_rule(max_staleness=7)"
    with pytest.raises(ValueError, match=r"^Expected zeta=-1 to be a finite number of at least"):
        sasg_jax.clag_rule(-1)
    with pytest.raises(ValueError, match=r"^Expected max_staleness=0 to be an integer"):
        sasg_jax.clag_rule(max_staleness=0)
