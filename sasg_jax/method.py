"""A method: the parts of one algorithm, checked once."""

import dataclasses
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import optax

from sasg_jax import exchanges as exchanges_lib
from sasg_jax import feedback as feedback_lib
from sasg_jax._checks import (
    check_axis_name,
    check_choice,
    check_int,
    check_key,
    expected,
)
from sasg_jax.coders import Coder, coded
from sasg_jax.compressors import Compressor, identity, top_k
from sasg_jax.exchanges import Exchange, Needs
from sasg_jax.exchanges.shards import per_shard
from sasg_jax.feedback import Feedback
from sasg_jax.rules import SILENCES, Rule, always
from sasg_jax.rules.base import Round
from sasg_jax.states import Wire

PyTree = Any


class Parts(TypedDict, total=False):
    """The parts of a method that need not be said, as keyword arguments."""

    feedback: Feedback | None
    """What becomes of what a message leaves out: :func:`sasg_jax.residual` by default, or
    :func:`sasg_jax.none` for a compressor that is exact or unbiased."""
    silence: str | None
    """What a silent worker counts as: ``"reuse"``, its last message again (the paper's);
    ``"keep"``, nothing, while its direction goes into its residual; ``"drop"``, nothing, in a mean
    over those that sent. By default what suits the rule: ``"reuse"`` for
    :func:`sasg_jax.innovation`, ``"keep"`` for :func:`sasg_jax.every`."""
    coder: Coder | None
    """How a message is written; as it is by default."""
    downlink: Compressor | None
    """Compressor of the way down, e.g. ``top_k(0.01)``; dense by default."""
    downlink_coder: Coder | None
    """How the server's message is written."""
    exchange: str | Exchange | None
    """How messages travel, one of :data:`sasg_jax.exchanges.EXCHANGES` by name or an object of
    one's own. By default what suits: ``"server"`` with a ``downlink``; ``"lazy"`` where workers may
    be silent; ``"psum"`` where all always send messages that add up; else ``"gather"``."""
    key: Any
    """For a compressor that draws at random. Each round and worker folds it anew."""
    axis_name: str
    """Name of the mapped axis over workers, ``"workers"`` by default."""


@dataclasses.dataclass(frozen=True)
class Method:
    """The parts of one algorithm, as :func:`make_method` has checked them."""

    compressor: Compressor
    rule: Rule
    feedback: Feedback
    silence: str
    downlink: Compressor
    exchange: Exchange
    num_workers: int
    learning_rate: optax.ScalarOrSchedule | None
    key: Any
    axis_name: str

    @property
    def complete(self) -> bool:
        """Whether it has a learning rate, and so makes the step itself."""
        return self.learning_rate is not None

    @property
    def tells(self) -> bool:
        """Whether workers must tell who uploads."""
        return _tells(self.rule, self.silence, self.feedback)

    @property
    def keeps(self) -> bool:
        """Whether a silent worker's direction goes into its residual."""
        return self.silence == "keep" and not self.rule.always

    @property
    def remembers(self) -> bool:
        """Whether the server keeps every worker's last message."""
        return self.silence == "reuse" and not self.feedback.reconstructs

    @property
    def downlink_feedback(self) -> Feedback:
        """What becomes of the part of the step that the way down leaves out."""
        return _default_feedback(self.downlink, keeps=False)

    @property
    def settings(self) -> tuple[tuple[str, str], ...]:
        """What a state is made for: names of the parts."""
        return (
            ("num_workers", str(self.num_workers)),
            ("compressor", self.compressor.name),
            ("rule", self.rule.name),
            ("feedback", self.feedback.name),
            ("silence", self.silence),
            ("downlink", self.downlink.name),
            ("exchange", self.exchange.name),
        )

    def per_link(self, compressor: Compressor) -> Compressor:
        """``compressor`` as a worker uses it, that of a whole tree."""
        return per_shard(compressor, self.num_workers) if self.exchange.sharded else compressor

    def rate(self, round: jax.Array) -> jax.Array | None:
        """γ of a round, None where there is none."""
        rate = self.learning_rate(round) if callable(self.learning_rate) else self.learning_rate
        return None if rate is None else jnp.asarray(rate)

    def round(self, params: PyTree, number: jax.Array) -> Round:
        """What all workers know of a round."""
        return Round(params, number, self.num_workers, self.rate(number))

    def keys(self, round: jax.Array, worker: jax.Array) -> tuple[Any, Any]:
        """Data of the key with which a worker compresses, and of the one that all share.

        As data, since a loop over workers passes arrays of numbers. () without a key.
        """
        if self.key is None:
            return (), ()
        shared = jax.random.fold_in(self.key, round)
        own = jax.random.fold_in(shared, worker)
        return jax.random.key_data(own), jax.random.key_data(shared)

    def compressor_key(self, compressor: Compressor, keys: tuple[Any, Any]) -> Any:
        """The key that :meth:`keys` has for a compressor; None for one that draws nothing."""
        if not compressor.random:
            return None
        return jax.random.wrap_key_data(
            keys[1] if compressor.shares_key else keys[0], impl=jax.random.key_impl(self.key)
        )

    def decoder_key(self, compressor: Compressor, keys: tuple[Any, Any]) -> Any:
        """The key with which a message is decoded; None where it says all itself."""
        return self.compressor_key(compressor, keys) if compressor.shares_key else None

    def wire(self, params: PyTree) -> Wire:
        """What one round moves."""
        up, down = self.per_link(self.compressor), self.per_link(self.downlink)
        size, step = up.message_size(params), down.message_size(params)
        exchange = self.exchange
        ours = exchanges_lib.EXCHANGES.get(exchange.name) is exchange
        return Wire(
            num_workers=self.num_workers,
            upload_bytes=size.bytes,
            upload_paper_bits=size.paper_bits,
            flag_bytes=int(self.tells),
            downlink_bytes=0 if exchange.forwards else step.bytes,
            moved_upload_bytes=exchange.moved_bytes(up.message_shapes(params)),
            moved_downlink_bytes=exchange.moved_bytes(down.message_shapes(params)),
            max_staleness=self.rule.max_staleness or 0,
            exchange=exchange.name,
            method=self.settings,
            custom_exchange=None if ours else exchange,
        )


def make_method(
    compressor: Compressor | None = None,
    rule: Rule | None = None,
    *,
    num_workers: int,
    learning_rate: optax.ScalarOrSchedule | None = None,
    feedback: Feedback | None = None,
    silence: str | None = None,
    coder: Coder | None = None,
    downlink: Compressor | None = None,
    downlink_coder: Coder | None = None,
    exchange: str | Exchange | None = None,
    key: Any = None,
    axis_name: str = "workers",
) -> Method:
    """Checks the parts of a method and puts them together.

    The arguments are those of :func:`sasg_jax.aggregate`, and a learning rate.

    Raises:
      ValueError: an argument is out of its range, or does not go with the others.
    """
    compressor = top_k(0.01) if compressor is None else compressor
    rule = always() if rule is None else rule
    optional = type(None)
    for name, value, kind in (
        ("compressor", compressor, Compressor),
        ("rule", rule, Rule),
        ("feedback", feedback, (Feedback, optional)),
        ("coder", coder, (Coder, optional)),
        ("downlink", downlink, (Compressor, optional)),
        ("downlink_coder", downlink_coder, (Coder, optional)),
    ):
        if not isinstance(value, kind):
            raise expected(name, value, f"to be made by sasg_jax.{_MAKERS[name]}")
    num_workers = check_int("num_workers", num_workers, minimum=1)
    check_axis_name(axis_name)
    if learning_rate is None and rule.needs_learning_rate:
        raise expected(
            "rule",
            rule.name,
            "to have a number or numbers for alpha: as a function of the learning rate it needs an "
            "optimiser that has one (sasg_jax.sasg, compressed_sgd), and aggregate has none",
        )
    silence = rule.silence if silence is None else check_choice("silence", silence, SILENCES)
    if downlink_coder is not None and downlink is None:
        raise expected("downlink_coder", downlink_coder.name, "to come with a downlink=...")
    if downlink is not None and downlink.compress_mean is not None:
        raise expected("downlink", downlink.name, "to need no means over workers")
    key = check_key(key)
    mean_inside = compressor.compress_mean is not None
    for name, value, right, allowed in (
        ("rule", rule.name, rule.always, "always()"),
        ("silence", silence, silence == "keep", "'keep'"),
        ("coder", coder and coder.name, coder is None, "None"),
        ("downlink", downlink and downlink.name, downlink is None, "None"),
    ):
        if mean_inside and not right:
            raise expected(name, value, f"to be {allowed} for {compressor.name}, which takes means")
    compressor = compressor if coder is None else coded(compressor, coder)
    down = identity() if downlink is None else downlink
    down = down if downlink_coder is None else coded(down, downlink_coder)
    needs_key = [part.name for part in (compressor, down) if part.random]
    if needs_key and key is None:
        raise expected("key", key, f"to be a PRNG key for {needs_key[0]}, which draws at random")
    keeps = silence == "keep" and not rule.always
    feedback = _default_feedback(compressor, keeps) if feedback is None else feedback
    if keeps and feedback.keep is None and not feedback.reconstructs:
        raise expected(
            "silence", silence, f"to be 'reuse' or 'drop' with {feedback.name}, which keeps nothing"
        )
    if feedback.reconstructs:
        if silence == "drop" or mean_inside:
            raise expected(
                "feedback", feedback.name, "only where a silent worker counts as what it has sent"
            )
        silence = "reuse"
    if compressor.shares_key and silence == "reuse" and not feedback.reconstructs:
        raise expected(
            "silence", silence, f"to be 'keep' or 'drop' for {compressor.name}: a last message "
            "cannot be decoded with the key of another round"
        )  # fmt: skip
    needs = Needs(
        always=not _tells(rule, silence, feedback),
        linear=compressor.linear,
        mean_inside=mean_inside,
        downlink=downlink is not None,
    )
    return Method(
        compressor=compressor,
        rule=rule,
        feedback=feedback,
        silence=silence,
        downlink=down,
        exchange=exchanges_lib.choose(exchange, needs),
        num_workers=num_workers,
        learning_rate=learning_rate,
        key=key,
        axis_name=axis_name,
    )


def _default_feedback(compressor: Compressor, keeps: bool) -> Feedback:
    if keeps or not (compressor.exact or compressor.unbiased):
        return feedback_lib.residual()
    return feedback_lib.none()


def _tells(rule: Rule, silence: str, feedback: Feedback) -> bool:
    """Also where all always upload, a refused gradient is a silent worker that counts as such."""
    return not rule.always or (silence != "keep" and not feedback.reconstructs)


_MAKERS = {
    "compressor": "top_k, sasg_jax.identity or a Compressor of your own",
    "rule": "innovation, sasg_jax.always, sasg_jax.every or a Rule of your own",
    "feedback": "residual, sasg_jax.none or sasg_jax.reconstruction, or to be None",
    "coder": "plain or a Coder of your own, or to be None",
    "downlink": "top_k, sasg_jax.identity or a Compressor of your own, or to be None",
    "downlink_coder": "plain or a Coder of your own, or to be None",
}
