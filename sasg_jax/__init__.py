"""SASG in JAX: data-parallel training that sends little and seldom.

Sparse messages with error feedback, only from workers whose gradient has changed enough, as an
optax gradient transformation. See :mod:`sasg_jax.algorithms` for the four methods.
"""

from sasg_jax.algorithms import lasg, sasg, sgd, sparse_sgd
from sasg_jax.compressors import Compressor, MessageSize, identity, top_k
from sasg_jax.ledger import Ledger
from sasg_jax.server import ServerState
from sasg_jax.state_axes import per_worker, stack_workers, worker_axes, worker_specs
from sasg_jax.train_step import (
    RoundInfo,
    TrainState,
    TrainStep,
    make_train_step,
    mean_model_state,
)
from sasg_jax.transform import (
    AggregateState,
    Diagnostics,
    WireSizes,
    aggregate,
    diagnostics,
)
from sasg_jax.upload_rules import UploadRule, always, innovation, released_alpha
from sasg_jax.worker import WorkerState

__all__ = [
    "AggregateState",
    "Compressor",
    "Diagnostics",
    "Ledger",
    "MessageSize",
    "RoundInfo",
    "ServerState",
    "TrainState",
    "TrainStep",
    "UploadRule",
    "WireSizes",
    "WorkerState",
    "aggregate",
    "always",
    "diagnostics",
    "identity",
    "innovation",
    "lasg",
    "make_train_step",
    "mean_model_state",
    "per_worker",
    "released_alpha",
    "sasg",
    "sgd",
    "sparse_sgd",
    "stack_workers",
    "top_k",
    "worker_axes",
    "worker_specs",
]
