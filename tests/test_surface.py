"""What users see, what importing costs, and who knows of whom."""

import ast
import inspect
import pathlib
import subprocess
import sys
import tomllib
import types
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import sasg_jax
from sasg_jax import compressors, exchanges, rules

LIBRARY = pathlib.Path(sasg_jax.__file__).parent
ROOT = LIBRARY.parent
FILES = {
    str(path.relative_to(ROOT)): path
    for folder in ("sasg_jax", "experiments", "examples")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
OF_THE_LIBRARY = [name for name in FILES if name.startswith("sasg_jax/")]


# Names and signatures -----------------------------------------------------------------------------


def test_all_is_sorted_and_complete():
    public = {
        name
        for name, value in vars(sasg_jax).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert sasg_jax.__all__ == sorted(public | {"coders", "exchanges"})


@pytest.mark.parametrize("module", [compressors, exchanges, rules])
def test_all_of_the_packages_is_there(module):
    """And they have no function or class beside it that is their own."""
    own = {
        name
        for name, value in vars(module).items()
        if isinstance(value, types.FunctionType | type)
        and value.__module__.startswith(module.__name__)
    }
    assert own <= set(module.__all__) <= vars(module).keys()


def _written(thing):
    """Whether it has a docstring that somebody wrote, and not one that Python made."""
    doc = inspect.getdoc(thing)
    return bool(doc) and not doc.startswith((f"{getattr(thing, '__name__', '')}(", "Alias for"))


@pytest.mark.parametrize("name", sasg_jax.__all__)
def test_public_names_are_documented(name):
    """And so are the methods and properties of public classes."""
    thing = getattr(sasg_jax, name)
    assert _written(thing)
    if isinstance(thing, type):
        kinds = types.FunctionType, property, classmethod
        fields = getattr(thing, "__dataclass_fields__", {})  # said to be what under Args
        public = {k: v for k, v in vars(thing).items() if k[0] != "_" and k not in fields}
        assert not [k for k, v in public.items() if isinstance(v, kinds) and not _written(v)]


@pytest.mark.parametrize("module", [compressors, exchanges, rules])
def test_names_of_the_packages_are_documented(module):
    functions = [getattr(module, name) for name in module.__all__]
    assert all(_written(thing) for thing in functions if callable(thing))


def test_version_is_that_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert sasg_jax.__version__ in (project["version"], "0+unknown")


PARAMS = {"w": jnp.zeros(8)}
RULE = [
    ("alpha", None),
    ("max_staleness", 10),
    ("history", 10),
    ("share_stale_params", False),
]
DENSITY = [("density", 0.01)]
KEEP = [("theta", 1.0), ("max_staleness", 8), ("share_stale_params", False)]
SIGNATURES = {
    "sgd": [],
    "sparse_sgd": DENSITY,
    "lasg": RULE,
    "sasg": [*DENSITY, *RULE],
    "turn_sgd": [*DENSITY, ("period", 8)],
    "sasg_keep": [*DENSITY, *KEEP],
    "sign_sgd": [],
    "terngrad": [("clip", 2.5)],
    "fo_sgd": [],
}
DRAWS = {"terngrad": {"key": jax.random.key(0)}, "fo_sgd": {"key": jax.random.key(0)}}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature_of_the_methods(name):
    """Everything but the learning rate by keyword, the parts that all take at the end."""
    *parameters, parts = inspect.signature(getattr(sasg_jax, name)).parameters.values()
    rate, workers, *others = parameters
    assert (rate.name, rate.kind) == ("learning_rate", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    assert (workers.name, workers.kind) == ("num_workers", inspect.Parameter.KEYWORD_ONLY)
    assert rate.default is workers.default is inspect.Parameter.empty
    assert [(p.name, p.default) for p in others] == SIGNATURES[name]
    assert {p.kind for p in others} <= {inspect.Parameter.KEYWORD_ONLY}
    assert parts.kind is inspect.Parameter.VAR_KEYWORD


@pytest.mark.parametrize("name", ["sparse_sgd", "sasg", "turn_sgd", "sasg_keep"])
def test_how_the_top_k_are_chosen_and_written(name):
    """By keywords of top_k; within each tensor for the paper's methods, in the tree for ours."""
    method = getattr(sasg_jax, name)
    made = lambda **how: dict(method(0.1, num_workers=2, **how).init(PARAMS).wire.method)
    scope = "" if name in ("sparse_sgd", "sasg") else ", scope='tree'"
    assert made()["compressor"] == f"top_k(0.01{scope})"
    how = {"scope": "tree", "selection": "approximate", "values": "sign", "indices": "elias_fano"}
    everything = ", ".join(f"{key}={value!r}" for key, value in how.items())
    assert made(density=0.1, **how)["compressor"] == f"top_k(0.1, {everything})"
    # optax hands on what is not in the signature as one argument.
    static = ("num_workers", "density", "max_staleness", "period", "history")
    static = tuple(x for x in static if x in inspect.signature(method).parameters)
    injected = optax.inject_hyperparams(method, static_args=static)
    state: Any = injected(learning_rate=0.1, num_workers=2, density=0.1, **how).init(PARAMS)
    assert dict(state.inner_state.wire.method)["compressor"] == f"top_k(0.1, {everything})"


@pytest.mark.parametrize("name", SIGNATURES)
def test_methods_are_optax_transformations(name):
    tx = getattr(sasg_jax, name)(0.1, num_workers=2, **DRAWS.get(name, {}))
    assert isinstance(tx, optax.GradientTransformationExtraArgs)


# What importing costs -----------------------------------------------------------------------------


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


def test_needs_jax_and_optax_only():
    """Beside Python's own and what jax itself needs."""
    allowed = sys.stdlib_module_names | {"jax", "optax", "numpy", "sasg_jax"}
    for name in OF_THE_LIBRARY:
        modules = {module.split(".")[0] for module in _imports(FILES[name])}
        assert modules <= allowed, name


# Who knows of whom --------------------------------------------------------------------------------


def _imports(path):
    """Full names of what a file imports; ``from a import b`` is a.b where that is a module."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module, path
            assert not node.level, path
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {name for name in inner if _is_module(name)}
            found |= modules or {node.module}
    return found


def _is_module(name):
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


# Each knows of those above it and, within a package, of its own. The exchanges know of compressors
# where they cut them into shards.
LAYERS = [
    {"numerics"},
    {"_checks"},
    {"bits", "control_flow"},
    {"coders", "selection"},
    {"compressors"},
    {"directions", "exchanges", "feedback", "rules"},
    {"states"},
    {"ledger", "method", "state_axes"},
    {"server", "worker"},
    {"transform"},
    {"algorithms", "local_algorithms", "train_state"},
    {"drivers", "resize"},
    {"train_step"},
    {"__init__"},
]


def _part(module):
    """``compressors`` of ``sasg_jax.compressors.base``."""
    return (module.split(".") + ["__init__"])[1]


def test_dependencies_run_one_way():
    depth = {part: i for i, layer in enumerate(LAYERS) for part in layer}
    parts = {pathlib.Path(name).with_suffix("").parts[1] for name in OF_THE_LIBRARY}
    assert parts == depth.keys()
    for name in OF_THE_LIBRARY:
        part = pathlib.Path(name).with_suffix("").parts[1]
        needed = {_part(x) for x in _imports(FILES[name]) if x.startswith("sasg_jax")} - {part}
        assert all(depth[other] < depth[part] for other in needed), (name, needed)


def test_modules_of_a_package_need_each_other_one_way():
    """The contract first: no module of a package imports one that imports it."""
    graph = {}
    for name in OF_THE_LIBRARY:
        module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        graph[module] = {x for x in _imports(FILES[name]) if x.startswith("sasg_jax.")}
    done = set()

    def visit(module, on_the_way):
        assert module not in on_the_way, [*on_the_way, module]
        if module not in done:
            for other in graph[module]:
                visit(other, [*on_the_way, module])
            done.add(module)

    for module in graph:
        visit(module, [])


def _compared(path):
    """The string constants that a file compares something with, or looks something up among."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Compare | ast.match_case):
            inside = node if isinstance(node, ast.Compare) else node.pattern
            for constant in ast.walk(inside):
                if isinstance(constant, ast.Constant) and isinstance(constant.value, str):
                    yield constant.value


@pytest.mark.parametrize("name", FILES)
def test_nobody_else_compares_the_name_of_an_exchange(name):
    """What it does is asked of its fields: one of one's own has another name."""
    if not name.startswith("sasg_jax/exchanges/"):
        assert not set(_compared(FILES[name])) & exchanges.EXCHANGES.keys()


STALE = ("stale_params", "recent_params", "previous_params")


def _identifiers(path):
    for node in ast.walk(ast.parse(path.read_text())):
        for field in ("id", "attr", "arg", "name"):
            if isinstance(word := getattr(node, field, None), str):
                yield word


@pytest.mark.parametrize("name", OF_THE_LIBRARY)
def test_only_rules_know_of_old_parameters(name):
    """That some are kept, and where, is a rule's own memory; its argument is handed on."""
    if not name.startswith("sasg_jax/rules/"):
        words = set(_identifiers(FILES[name])) - {"share_stale_params"}
        assert not [word for word in words if any(part in word for part in STALE)]


FLAGS_OF_A_RULE = {"always", "max_staleness", "needs_learning_rate"}


def test_flags_of_a_rule_are_read_where_it_is_called():
    """And where a method is put together; whoever else asked would know one rule from another."""
    for name in OF_THE_LIBRARY:
        for node in ast.walk(ast.parse(FILES[name].read_text())):
            if not isinstance(node, ast.Attribute) or node.attr not in FLAGS_OF_A_RULE:
                continue
            if ast.unparse(node.value).split(".")[-1] == "rule":
                places = [f"sasg_jax/{part}.py" for part in ("method", "server", "worker")]
                assert name in places, ast.unparse(node)
