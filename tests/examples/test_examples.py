"""What every example is: short, made of public names only, and a program that runs."""

import ast
import pathlib
import runpy
import subprocess
import sys

import pytest

import sasg_jax

ROOT = pathlib.Path(sasg_jax.__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NAMES = [path.stem for path in EXAMPLES]
ALLOWED = {"jax", "numpy", "optax", "sasg_jax", *sys.stdlib_module_names}


def _modules(tree):
    """What a program imports, as ``a.b`` and as ``a.b`` for ``from a import b``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _names_of_ours(tree):
    """The names of ours that a program uses."""
    yield from (x.removeprefix("sasg_jax.") for x in _modules(tree) if x.startswith("sasg_jax."))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "sasg_jax":
            yield node.attr


def test_there_is_one_of_each_kind():
    kinds = "qsgd random_k power_sgd relative_rule lag diloco over_files".split()
    assert set(kinds) <= set(NAMES)


@pytest.mark.parametrize("path", EXAMPLES, ids=NAMES)
def test_is_short(path):
    assert len(path.read_text().splitlines()) <= 60


@pytest.mark.parametrize("path", EXAMPLES, ids=NAMES)
def test_uses_public_names_only(path):
    tree = ast.parse(path.read_text())
    assert {name.split(".")[0] for name in _modules(tree)} <= ALLOWED
    ours = set(_names_of_ours(tree))
    assert ours
    assert ours <= set(sasg_jax.__all__)
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not [name for name in attributes if name.startswith("_")]


@pytest.mark.parametrize(
    ("program", "names"),
    [
        ("import sasg_jax.selection", {"selection"}),
        ("from sasg_jax.rules.base import squared_norm", {"rules.base.squared_norm"}),
        ("import sasg_jax\nsasg_jax.worker.act", {"worker"}),
    ],
)
def test_what_is_not_public_is_seen(program, names):
    assert set(_names_of_ours(ast.parse(program))) == names
    assert not names & set(sasg_jax.__all__)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "over_files"])
def test_runs(name, capsys):
    """As ``python examples/NAME.py``: it prints what was reached, and what that cost."""
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr().out.split()
    assert printed[0] == "loss"
    assert float(printed[1]) < 0.5  # it starts above 10


@pytest.mark.processes
def test_runs_in_two_processes():
    """Both print the same parameters and the same bytes."""
    program = [sys.executable, str(ROOT / "examples" / "over_files.py")]
    result = subprocess.run(
        program, capture_output=True, text=True, cwd=ROOT, timeout=240, check=True
    )
    first, second = result.stdout.splitlines()
    assert first == second
