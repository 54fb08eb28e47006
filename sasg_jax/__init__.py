"""SASG in JAX: data-parallel training that sends little and seldom.

A kit of parts for training across slow links, as optax gradient transformations: directions, upload
rules, feedback, compressors, coders and exchanges, of which :func:`sasg_jax.compressed_sgd` and
:func:`sasg_jax.aggregate` make a method. See :mod:`sasg_jax.algorithms` and
:mod:`sasg_jax.local_algorithms` for the named ones.
"""

import importlib.metadata

from sasg_jax import coders, exchanges
from sasg_jax.algorithms import (
    cada,
    clag,
    cmfl,
    csgd,
    dgc,
    diana,
    ef21,
    fo_sgd,
    lag,
    lag_ps,
    laq,
    lasg,
    sasg,
    sasg_keep,
    sgd,
    sign_sgd,
    sparse_sgd,
    terngrad,
    turn_sgd,
)
from sasg_jax.coders import IndexCoder, ValueCoder
from sasg_jax.compressors import (
    Compressed,
    Compressor,
    MessageSize,
    atomo,
    by_leaf,
    chunked_top_k,
    dithered_sign,
    eden,
    grid,
    identity,
    induced,
    learned_levels,
    low_rank,
    natural,
    one_bit,
    power_sgd,
    qsgd,
    random_k,
    sign,
    ternary,
    top_k,
    wangni,
)
from sasg_jax.directions import Direction, Evaluation, gradient, local_steps, norm_test
from sasg_jax.drivers import on_devices, on_mesh, simulate, simulate_in_chunks
from sasg_jax.exchanges import Exchange, Links, Needs, Traffic
from sasg_jax.feedback import (
    AveragedReconstruction,
    Feedback,
    MomentumResidual,
    Reconstruction,
    Residual,
    momentum_residual,
    none,
    reconstruction,
    residual,
)
from sasg_jax.ledger import Ledger
from sasg_jax.local_algorithms import (
    LocalMethod,
    LocalParts,
    demo,
    diloco,
    local_sgd,
    muloco,
    sparse_loco,
)
from sasg_jax.method import Method, Parts, make_method
from sasg_jax.resize import resize
from sasg_jax.rules import (
    Decision,
    Round,
    Rule,
    View,
    always,
    cada_rule,
    clag_rule,
    cmfl_rule,
    direction_change,
    every,
    held_rate,
    innovation,
    lag_ps_rule,
    lag_rule,
    laq_rule,
    message_share,
    released_alpha,
    residual_norm,
)
from sasg_jax.server import init_server, server_half
from sasg_jax.state_axes import per_worker, stack_workers, worker_axes, worker_specs
from sasg_jax.states import (
    AggregateState,
    Diagnostics,
    PipelineState,
    ServerState,
    WorkerState,
    diagnostics,
)
from sasg_jax.train_state import RoundInfo, TrainState, mean_model_state, worker_round
from sasg_jax.train_step import TrainStep, make_train_step
from sasg_jax.transform import Transformation, aggregate, compressed_sgd, pipeline
from sasg_jax.worker import Post, init_worker, needs_direction, worker_half

try:
    __version__ = importlib.metadata.version("sasg_jax")
except importlib.metadata.PackageNotFoundError:  # run from a folder that was never installed
    __version__ = "0+unknown"

# fmt: off
__all__ = [
    "AggregateState", "AveragedReconstruction", "Compressed", "Compressor", "Decision",
    "Diagnostics", "Direction", "Evaluation", "Exchange", "Feedback", "IndexCoder", "Ledger",
    "Links", "LocalMethod", "LocalParts", "MessageSize", "Method", "MomentumResidual", "Needs",
    "Parts", "PipelineState", "Post", "Reconstruction", "Residual", "Round", "RoundInfo", "Rule",
    "ServerState", "Traffic", "TrainState", "TrainStep", "Transformation", "ValueCoder", "View",
    "WorkerState", "aggregate", "always", "atomo", "by_leaf", "cada", "cada_rule", "chunked_top_k",
    "clag", "clag_rule", "cmfl", "cmfl_rule", "coders", "compressed_sgd", "csgd", "demo", "dgc",
    "diagnostics", "diana", "diloco", "direction_change", "dithered_sign", "eden", "ef21", "every",
    "exchanges", "fo_sgd", "gradient", "grid", "held_rate", "identity", "induced", "init_server",
    "init_worker", "innovation", "lag", "lag_ps", "lag_ps_rule", "lag_rule", "laq", "laq_rule",
    "lasg", "learned_levels", "local_sgd", "local_steps", "low_rank", "make_method",
    "make_train_step", "mean_model_state", "message_share", "momentum_residual", "muloco",
    "natural", "needs_direction", "none", "norm_test", "on_devices", "on_mesh", "one_bit",
    "per_worker", "pipeline", "power_sgd", "qsgd", "random_k", "reconstruction", "released_alpha",
    "residual", "residual_norm", "resize", "sasg", "sasg_keep", "server_half", "sgd", "sign",
    "sign_sgd", "simulate", "simulate_in_chunks", "sparse_loco", "sparse_sgd", "stack_workers",
    "ternary", "terngrad", "top_k", "turn_sgd", "wangni", "worker_axes", "worker_half",
    "worker_round", "worker_specs",
]
