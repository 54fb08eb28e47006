"""What users see: names, signatures, and what importing costs."""

import inspect
import pathlib
import subprocess
import sys
import types

import optax
import pytest

import sasg_jax

ROOT = pathlib.Path(sasg_jax.__file__).parent.parent


def test_all_is_sorted_and_complete():
    public = {
        name
        for name, value in vars(sasg_jax).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert sasg_jax.__all__ == sorted(public)


@pytest.mark.parametrize("name", sasg_jax.__all__)
def test_public_names_are_documented(name):
    assert inspect.getdoc(getattr(sasg_jax, name))


RATE = [("learning_rate", inspect.Parameter.empty), ("num_workers", inspect.Parameter.empty)]
DENSITY = [("density", 0.01), ("selection", "auto")]
RULE = [("max_staleness", 10), ("history", 10), ("alpha", None)]
SHARE = ("share_stale_params", False)
SIGNATURES = {
    "sgd": [*RATE, ("downlink", None), ("exchange", "psum")],
    "sparse_sgd": [*RATE, *DENSITY, ("downlink", None), ("exchange", "gather")],
    "lasg": [*RATE, *RULE, ("downlink", None), ("exchange", "gather"), SHARE],
    "sasg": [*RATE, *DENSITY, *RULE, ("downlink", None), ("exchange", "gather"), SHARE],
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature_of_the_methods(name):
    """Everything but the learning rate by keyword."""
    parameters = list(inspect.signature(getattr(sasg_jax, name)).parameters.values())
    got = [(p.name, p.default) for p in parameters]
    assert got == [*SIGNATURES[name], ("axis_name", "workers")]
    kinds = [p.kind for p in parameters]
    assert kinds[0] is inspect.Parameter.POSITIONAL_OR_KEYWORD
    assert set(kinds[1:]) == {inspect.Parameter.KEYWORD_ONLY}


@pytest.mark.parametrize("name", SIGNATURES)
def test_methods_are_optax_transformations(name):
    tx = getattr(sasg_jax, name)(0.1, num_workers=2)
    assert isinstance(tx, optax.GradientTransformationExtraArgs)


def test_import_pulls_in_nothing_heavy():
    """A fresh interpreter that imports the package has loaded jax and optax, and no framework."""
    heavy = ("flax", "chex", "tensorflow", "tensorflow_datasets", "sklearn", "matplotlib")
    code = (
        "import sys, sasg_jax\n"
        f"loaded = sorted(set({heavy!r}) & {{name.split('.')[0] for name in sys.modules}})\n"
        "print('loaded', *loaded)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert result.stdout.split() == ["loaded"]
