"""A method: the parts of one algorithm, checked once."""

import dataclasses
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import optax

from sasg_jax._checks import check_axis_name, check_choice, check_int, check_key, expected, require
from sasg_jax.compressors import Compressor, identity, top_k
from sasg_jax.exchanges import EXCHANGES, Exchange, Needs, choose
from sasg_jax.exchanges.shards import per_shard
from sasg_jax.feedback import Feedback, none, reconstruction, residual
from sasg_jax.numerics import PyTree
from sasg_jax.rules import SILENCES, Round, Rule, always
from sasg_jax.states import Wire

MEANS = "workers", "senders"


class Parts(TypedDict, total=False):
    """The parts of a method that need not be said, as keyword arguments."""

    feedback: Feedback | None
    """What becomes of what a message leaves out: :func:`sasg_jax.residual` by default, or
    :func:`sasg_jax.none` for a compressor that is exact or unbiased, or
    :func:`sasg_jax.reconstruction` for a rule that compares with one."""
    silence: str | None
    """What a silent worker counts as: ``"reuse"``, its last message again (the paper's);
    ``"keep"``, nothing, while its direction goes into its residual; ``"drop"``, nothing, in a mean
    over those that sent. By default the rule's: ``"reuse"`` for :func:`sasg_jax.innovation`."""
    mean: str
    """Over whom the server takes it: ``"workers"``, by default: all M, or with silence ``"drop"``
    those that sent; ``"senders"``: of each coordinate, those whose message has a number other than
    0 there, as SparseLoCo's production code does. That can be M times as large."""
    downlink: Compressor | None  # of the way down, e.g. top_k(0.01); dense by default
    downlink_rule: Rule | None
    """When the server sends a step that is compressed, by default in every round. What it does not
    send stays in its residual. The rules that a worker can have, but for those that compare two
    directions; the server is then worker 0 of one, and its direction the mean."""
    exchange: str | Exchange | None
    """How messages travel, one of :data:`sasg_jax.exchanges.EXCHANGES` by name or an object of
    one's own. By default what suits: ``"server"`` with a ``downlink``; ``"lazy"`` where workers may
    be silent; ``"psum"`` where all always send messages that add up; else ``"gather"``."""
    key: Any  # for a compressor that draws at random; each round and worker folds it anew
    axis_name: str  # of the mapped axis over workers, "workers" by default


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
    tells: bool  # workers must tell who uploads
    keeps: bool  # a silent worker's direction goes into its residual
    remembers: bool  # the server keeps every worker's last message
    downlink_feedback: Feedback  # of the part of the step that the way down leaves out
    downlink_rule: Rule
    mean: str  # over "workers", or over each coordinate's "senders"

    @property
    def settings(self) -> tuple[tuple[str, str], ...]:
        """Names of the parts, for which a state is made."""
        parts = {name: getattr(self, name) for name in _SETTINGS}
        return tuple((name, str(getattr(part, "name", part))) for name, part in parts.items())

    def per_link(self, compressor: Compressor) -> Compressor:
        """``compressor`` as a worker uses it, that of a whole tree."""
        return per_shard(compressor, self.num_workers) if self.exchange.sharded else compressor

    def round(self, params: PyTree, number: jax.Array) -> Round:
        """What all workers know of a round."""
        rate = self.learning_rate
        if callable(rate):
            rate = rate(number)
            is_one = rate is not None and jnp.shape(rate) == () and jnp.isrealobj(rate)
            require(is_one, "learning_rate", rate, "to be a schedule that gives one real number")
        return Round(params, number, self.num_workers, None if rate is None else jnp.asarray(rate))

    def keys(self, round: jax.Array, worker: jax.Array) -> tuple[Any, Any]:
        """Data of the key with which a worker compresses, and of the one that all share; () without
        one. As data, since a loop over workers passes arrays of numbers."""
        if self.key is None:
            return (), ()
        shared = jax.random.fold_in(self.key, round)
        own = jax.random.fold_in(shared, worker)
        return jax.random.key_data(own), jax.random.key_data(shared)

    def compressor_key(self, compressor: Compressor, keys: tuple[Any, Any]) -> Any:
        """The key that :meth:`keys` has for a compressor; None for one that draws nothing."""
        if not compressor.random:
            return None
        data = keys[1] if compressor.shares_key else keys[0]
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(self.key))

    def decoder_key(self, compressor: Compressor, keys: tuple[Any, Any]) -> Any:
        """The key with which a message is decoded; None where it says all itself."""
        return self.compressor_key(compressor, keys) if compressor.shares_key else None

    def wire(self, params: PyTree) -> Wire:
        """What one round moves."""
        up, down = self.per_link(self.compressor), self.per_link(self.downlink)
        size, step, exchange = up.message_size(params), down.message_size(params), self.exchange
        down_bytes = 0 if exchange.forwards else step.bytes
        sizes = size.bytes, size.paper_bits, int(self.tells), down_bytes
        moved = lambda part: exchange.moved_bytes(part.message_shapes(params))
        custom = None if EXCHANGES.get(exchange.name) is exchange else exchange
        flag = int(not self.downlink_rule.always)
        of_all = self.compressor.compress_mean is not None
        rest: Any = self.rule.max_staleness or 0, flag, exchange.name, self.settings, of_all, custom
        return Wire(self.num_workers, *sizes, moved(up), moved(down), *rest)


_SETTINGS = (
    "num_workers compressor rule feedback silence mean downlink downlink_rule exchange"
).split()


def make_method(
    compressor: Compressor | None = None,
    rule: Rule | None = None,
    *,
    num_workers: int,
    learning_rate: optax.ScalarOrSchedule | None = None,
    feedback: Feedback | None = None,
    silence: str | None = None,
    mean: str = "workers",
    downlink: Compressor | None = None,
    downlink_rule: Rule | None = None,
    exchange: str | Exchange | None = None,
    key: Any = None,
    axis_name: str = "workers",
) -> Method:
    """Checks the parts of a method and puts them together: those of :func:`sasg_jax.aggregate`, and
    a learning rate. ValueError where one is out of its range, or does not go with the others."""
    compressor = top_k(0.01) if compressor is None else compressor
    rule = always() if rule is None else rule
    for name, value, kind, maker in (
        ("compressor", compressor, Compressor, "top_k, sasg_jax.identity"),
        ("rule", rule, Rule, "innovation, sasg_jax.always, sasg_jax.every"),
        ("feedback", feedback, Feedback, "residual, sasg_jax.none, sasg_jax.reconstruction"),
        ("downlink", downlink, Compressor, "top_k, sasg_jax.identity"),
        ("downlink_rule", downlink_rule, Rule, "every, sasg_jax.residual_norm"),
    ):
        optional = name not in ("compressor", "rule")
        if not (isinstance(value, kind) or (optional and value is None)):
            own = f" or a {kind.__name__} of your own" + ", or to be None" * optional
            raise expected(name, value, f"to be made by sasg_jax.{maker}{own}")
    num_workers = check_int("num_workers", num_workers, minimum=1)
    check_axis_name(axis_name)
    key = check_key(key)
    asked = silence
    silence = rule.silence if silence is None else check_choice("silence", silence, SILENCES)
    by_sender = check_choice("mean", mean, MEANS) == "senders"
    mean_inside = compressor.compress_mean is not None
    keeps = silence == "keep" and not rule.always
    up, down = compressor, identity() if downlink is None else downlink
    if feedback is None:
        feedback = reconstruction() if rule.needs_reconstruction else _default_feedback(up, keeps)
    means = f"for {compressor.name}, which takes means"
    draws = next((part.name for part in (up, down) if part.random), None)
    refuse = lambda wrong, name, x, why: require(not wrong, name, getattr(x, "name", x), why)
    allowed = "to have a number or numbers for alpha: as a function of the learning rate it needs "
    allowed += "an optimiser that has one (sasg_jax.sasg, compressed_sgd), and aggregate has none"
    refuse(learning_rate is None and rule.needs_learning_rate, "rule", rule, allowed)
    refuse(down.compress_mean is not None, "downlink", down, "to need no means over workers")
    refuse(mean_inside and not rule.always, "rule", rule, f"to be always() {means}")
    refuse(mean_inside and silence != "keep", "silence", silence, f"to be 'keep' {means}")
    refuse(mean_inside and downlink is not None, "downlink", downlink, f"to be None {means}")
    allowed = f"a PRNG key for {draws}, which draws" if draws else "None: nothing here draws"
    refuse((key is None) == bool(draws), "key", key, f"to be {allowed} at random")
    lost = keeps and feedback.keep is None and not feedback.reconstructs
    allowed = f"to be 'reuse' or 'drop' with {feedback.name}, which keeps nothing"
    refuse(lost, "silence", silence, allowed)
    allowed = f"to be reconstruction() for {rule.name}, which compares with what the server has"
    refuse(rule.needs_reconstruction and not feedback.reconstructs, "feedback", feedback, allowed)
    uncounted = silence == "drop" or asked == "keep" or mean_inside
    allowed = "only where a silent worker counts as what it has sent"
    refuse(feedback.reconstructs and uncounted, "feedback", feedback, allowed)
    allowed = f"to be 'workers' for {feedback.name}, of which the server keeps only a sum"
    refuse(feedback.reconstructs and by_sender, "mean", mean, allowed)
    refuse(mean_inside and by_sender, "mean", mean, f"to be 'workers' {means}")
    undecodable = up.shares_key and silence == "reuse" and not feedback.reconstructs
    allowed = f"to be 'keep' or 'drop' for {up.name}: a last message cannot be decoded with the "
    refuse(undecodable, "silence", silence, allowed + "key of another round")
    silence = "reuse" if feedback.reconstructs else silence
    # Also where all always upload, a refused gradient is a silent worker that counts as such.
    tells = not rule.always or (silence != "keep" and not feedback.reconstructs)
    needs = Needs(not tells, up.linear, mean_inside, downlink is not None, by_sender)
    exchange = choose(exchange, needs)
    allowed = f"to be 'workers' for exchange={exchange.name!r}, which collects a sum"
    refuse(exchange.sums and by_sender, "mean", mean, allowed)
    # A moving average of directions is kept up by those who are silent, too.
    averages = feedback.reconstructs and feedback.keep is not None and not rule.always
    keeps = averages or (keeps and silence == "keep")
    remembers = silence == "reuse" and not feedback.reconstructs
    rest = num_workers, learning_rate, key, axis_name, tells, keeps, remembers
    down_feedback = _default_feedback(down, keeps=False)
    down_rule = always() if downlink_rule is None else downlink_rule
    allowed = f"to be None for downlink={down.name}, of which nothing is kept for later"
    refuse(not down_rule.always and down_feedback.keep is None, "downlink_rule", down_rule, allowed)
    allowed = "to be one that compares no directions at two parameters: the server has none"
    refuse(down_rule.compares, "downlink_rule", down_rule, allowed)
    allowed = "to be one that needs no reconstruction: what the server holds back is a residual"
    refuse(down_rule.needs_reconstruction, "downlink_rule", down_rule, allowed)
    unknown = down_rule.needs_learning_rate and learning_rate is None
    refuse(unknown, "downlink_rule", down_rule, "to need no learning rate: aggregate has none")
    allowed = f"to be None for the exchange {exchange.name!r}, which cannot tell of it"
    told = down_rule.always or exchange.tell_down is not None
    refuse(not told, "downlink_rule", down_rule, allowed)
    of_server = down_feedback, down_rule, mean
    return Method(up, rule, feedback, silence, down, exchange, *rest, *of_server)


def _default_feedback(compressor: Compressor, keeps: bool) -> Feedback:
    lossless = compressor.exact or compressor.unbiased
    return none() if lossless and not keeps else residual()
