"""The parts of a method: what is chosen where nothing is said, what does not go together, keys."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sasg_jax
from sasg_jax import exchanges
from sasg_jax.compressors import Compressed

M = 4
ALWAYS, TURN, RULE = sasg_jax.always(), sasg_jax.every(2), sasg_jax.innovation(1.0)
IDENTITY, TOP_K = sasg_jax.identity(), sasg_jax.top_k(0.1)
KEY = jax.random.key(7)


def _draws(shares_key=False, unbiased=True):
    """A compressor with a key: a random half of the entries, or noise for want of any."""
    return dataclasses.replace(
        TOP_K, name="half()", random=True, shares_key=shares_key, unbiased=unbiased
    )


def _takes_means():
    def compress_mean(tree, memory, key, mean):
        return Compressed(mean(tree), jax.tree.map(jnp.zeros_like, tree), memory)

    return sasg_jax.Compressor(name="means()", compress_mean=compress_mean)


def _make(*parts, **kwargs):
    return sasg_jax.make_method(*parts, num_workers=M, **kwargs)


# What is chosen -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "kwargs", "feedback", "silence", "exchange"),
    [
        ((), {}, "residual()", "keep", "gather"),
        ((IDENTITY,), {}, "none()", "keep", "psum"),
        ((IDENTITY, RULE), {}, "none()", "reuse", "lazy"),
        ((TOP_K, RULE), {}, "residual()", "reuse", "lazy"),
        ((TOP_K, RULE), {"downlink": TOP_K}, "residual()", "reuse", "server"),
        ((TOP_K, TURN), {}, "residual()", "keep", "lazy"),
        ((TOP_K, sasg_jax.innovation()), {}, "residual()", "keep", "lazy"),
        ((IDENTITY, sasg_jax.innovation()), {}, "residual()", "keep", "lazy"),
        # What it keeps it must put somewhere, also where nothing is left out.
        ((IDENTITY, TURN), {}, "residual()", "keep", "lazy"),
        ((IDENTITY, TURN), {"silence": "drop"}, "none()", "drop", "lazy"),
        ((_draws(),), {"key": KEY}, "none()", "keep", "gather"),
        ((_draws(unbiased=False),), {"key": KEY}, "residual()", "keep", "gather"),
        # A silent worker counts as its reconstruction.
        (
            (TOP_K, TURN),
            {"feedback": sasg_jax.reconstruction()},
            "reconstruction()",
            "reuse",
            "lazy",
        ),
        ((TOP_K,), {"feedback": sasg_jax.reconstruction()}, "reconstruction()", "reuse", "gather"),
        # Someone who drops out of a mean must say so.
        ((IDENTITY,), {"silence": "drop"}, "none()", "drop", "lazy"),
        ((_takes_means(),), {}, "residual()", "keep", "psum"),
        # A sum does not tell how many have sent a coordinate.
        ((IDENTITY,), {"mean": "senders"}, "none()", "keep", "gather"),
        ((TOP_K, TURN), {"mean": "senders"}, "residual()", "keep", "lazy"),
    ],
)
def test_what_suits(parts, kwargs, feedback, silence, exchange):
    method = _make(*parts, **kwargs)
    assert method.feedback.name == feedback
    assert method.silence == silence
    assert method.exchange.name == exchange


@pytest.mark.parametrize(
    ("parts", "kwargs", "tells", "keeps", "remembers"),
    [
        ((), {}, False, False, False),
        ((TOP_K, RULE), {}, True, False, True),
        ((TOP_K, RULE), {"silence": "keep"}, True, True, False),
        ((TOP_K, TURN), {}, True, True, False),
        ((TOP_K, sasg_jax.every(1)), {}, False, False, False),
        ((TOP_K, ALWAYS), {"silence": "reuse"}, True, False, True),
        ((TOP_K, TURN), {"feedback": sasg_jax.reconstruction()}, True, False, False),
        ((TOP_K, ALWAYS), {"feedback": sasg_jax.reconstruction()}, False, False, False),
    ],
)
def test_what_follows(parts, kwargs, tells, keeps, remembers):
    method = _make(*parts, **kwargs)
    assert (method.tells, method.keeps, method.remembers) == (tells, keeps, remembers)


def test_way_down_keeps_what_it_leaves_out():
    assert _make(downlink=TOP_K).downlink_feedback.name == "residual()"
    assert _make(downlink=_draws(), key=KEY).downlink_feedback.name == "none()"
    assert _make().downlink_feedback.name == "none()"


def test_settings_tell_methods_apart():
    """By them a state of another method is refused, so every part must be in them."""
    methods = [
        _make(TOP_K, RULE),
        sasg_jax.make_method(TOP_K, RULE, num_workers=M + 1),
        _make(sasg_jax.top_k(0.2), RULE),
        _make(sasg_jax.top_k(0.1, scope="tree"), RULE),
        _make(sasg_jax.top_k(0.1, values="sign"), RULE),
        _make(sasg_jax.top_k(0.1, values=sasg_jax.coders.signs(block=9)), RULE),
        _make(sasg_jax.top_k(0.1, indices="elias_fano"), RULE),
        _make(TOP_K, sasg_jax.innovation(1.0, max_staleness=9)),
        _make(TOP_K, sasg_jax.innovation(1.0, history=9)),
        _make(TOP_K, sasg_jax.innovation(1.0, share_stale_params=True)),
        _make(TOP_K, sasg_jax.innovation()),
        _make(TOP_K, sasg_jax.innovation(max_staleness=10)),
        _make(TOP_K, sasg_jax.innovation(look_every=9)),
        _make(TOP_K, sasg_jax.innovation(share_stale_params=True)),
        _make(TOP_K, sasg_jax.message_share()),
        _make(TOP_K, sasg_jax.residual_norm()),
        _make(TOP_K, sasg_jax.residual_norm(history=9)),
        _make(TOP_K, sasg_jax.direction_change()),
        _make(TOP_K, sasg_jax.held_rate(0.2, sasg_jax.innovation())),
        _make(TOP_K, sasg_jax.held_rate(0.3, sasg_jax.innovation())),
        _make(TOP_K, sasg_jax.held_rate(0.2, sasg_jax.message_share())),
        _make(TOP_K, TURN),
        _make(TOP_K, sasg_jax.every(2, staggered=False)),
        _make(TOP_K, TURN, feedback=sasg_jax.residual(0.9)),
        _make(TOP_K, RULE, silence="keep"),
        _make(TOP_K, RULE, downlink=TOP_K),
        _make(TOP_K, RULE, downlink=sasg_jax.top_k(0.1, values="sign")),
        _make(TOP_K, RULE, exchange="gather"),
    ]
    assert len({method.settings for method in methods}) == len(methods)
    # The weights of the threshold may change from one part of a run to the next.
    assert _make(TOP_K, sasg_jax.innovation(2.0)).settings == methods[0].settings
    one, other = (_make(TOP_K, sasg_jax.innovation(theta=theta)) for theta in (0.1, 0.2))
    assert one.settings == other.settings


# What does not go together ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "kwargs", "message"),
    [
        ((0.1,), {}, "Expected compressor=0.1 to be made by sasg_jax.top_k, sasg_jax.identity or"),
        ((TOP_K, 1.0), {}, "Expected rule=1.0 to be made by sasg_jax.innovation, sasg_jax.always"),
        (
            (),
            {"feedback": "keep"},
            "Expected feedback='keep' to be made by sasg_jax.residual, sasg",
        ),
        (
            (),
            {"downlink": 0.1},
            "Expected downlink=0.1 to be made by sasg_jax.top_k, sasg_jax.iden",
        ),
        ((), {"silence": "hold"}, "Expected silence='hold' to be one of 'reuse', 'keep', 'drop'."),
        (
            (TOP_K, sasg_jax.innovation(sasg_jax.released_alpha(0.5, M))),
            {},
            "Expected rule='innovation(max_staleness=10, history=10)' to have a number or numbers "
            "for alpha: ",
        ),
        (
            (TOP_K, TURN),
            {"feedback": sasg_jax.none()},
            "Expected silence='keep' to be 'reuse' or 'drop' with none(), which keeps nothing.",
        ),
        (
            (TOP_K, TURN),
            {"feedback": sasg_jax.reconstruction(), "silence": "drop"},
            "Expected feedback='reconstruction()' only where a silent worker counts as what it has",
        ),
        ((_draws(),), {}, "Expected key=None to be a PRNG key for half(), which draws at random."),
        (
            (),
            {"downlink": _draws()},
            "Expected key=None to be a PRNG key for half(), which draws at random.",
        ),
        ((), {"key": 7}, "Expected key=7 to be a PRNG key, e.g. jax.random.key(0)."),
        (
            (_draws(shares_key=True), RULE),
            {"key": KEY},
            "Expected silence='reuse' to be 'keep' or 'drop' for half(): a last message cannot be",
        ),
        (
            (_takes_means(), RULE),
            {},
            "Expected rule='innovation(max_staleness=10, history=10)' to be always() for means()",
        ),
        (
            (_takes_means(),),
            {"downlink": TOP_K},
            "Expected downlink='top_k(0.1)' to be None for means(), which takes means",
        ),
        (
            (_takes_means(),),
            {"silence": "drop"},
            "Expected silence='drop' to be 'keep' for means(), which takes means",
        ),
        (
            (_takes_means(),),
            {"feedback": sasg_jax.reconstruction()},
            "Expected feedback='reconstruction()' only where a silent worker counts as what it has",
        ),
        (
            (),
            {"downlink": _takes_means()},
            "Expected downlink='means()' to need no means over workers.",
        ),
        (
            (_takes_means(),),
            {"exchange": "gather"},
            "Expected exchange='gather' to be 'psum' for a compressor that takes means",
        ),
        (
            (TOP_K,),
            {"exchange": "psum"},
            "Expected exchange='psum' to be another where a worker may be silent or messages do no",
        ),
        (
            (TOP_K,),
            {"exchange": "gather", "downlink": TOP_K},
            "Expected exchange='gather' to be 'server' or 'sharded' for downlink=...",
        ),
        ((), {"mean": "all"}, "Expected mean='all' to be one of 'workers', 'senders'."),
        (
            (TOP_K,),
            {"mean": "senders", "feedback": sasg_jax.reconstruction()},
            "Expected mean='senders' to be 'workers' for reconstruction(), of which the server ke",
        ),
        (
            (_takes_means(),),
            {"mean": "senders"},
            "Expected mean='senders' to be 'workers' for means(), which takes means",
        ),
        (
            (IDENTITY,),
            {"mean": "senders", "exchange": "psum"},
            "Expected exchange='psum' to be another for mean='senders': a sum does not tell how m",
        ),
        (
            (IDENTITY,),
            {
                "mean": "senders",
                "exchange": dataclasses.replace(
                    exchanges.EXCHANGES["psum"], name="ring", refuses=lambda needs: None
                ),
            },
            "Expected mean='senders' to be 'workers' for exchange='ring', which collects a sum.",
        ),
        ((), {"axis_name": ""}, "Expected axis_name='' to be a non-empty string."),
    ],
)
def test_what_does_not_go_together_is_refused(parts, kwargs, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        _make(*parts, **kwargs)


def test_several_keys_are_not_one():
    with pytest.raises(ValueError, match=r"(?s)^Expected key=.* to be one PRNG key\.$"):
        _make(key=jax.random.split(KEY))


def test_alpha_that_is_a_function_may_have_a_learning_rate():
    rule = sasg_jax.innovation(sasg_jax.released_alpha(0.5, M))
    assert _make(TOP_K, rule, learning_rate=0.1).learning_rate == 0.1
    assert _make(TOP_K, RULE).learning_rate is None


# Random numbers -----------------------------------------------------------------------------------


def _key_bytes(key):
    return None if key is None else np.asarray(jax.random.key_data(key)).tobytes()


def _keys(method, rounds=3, workers=3):
    """What compresses and what decodes a message, by round and worker."""
    table = {}
    for t in range(rounds):
        for m in range(workers):
            keys = method.keys(jnp.int32(t), jnp.int32(m))
            compressor = method.compressor
            table[t, m] = (
                _key_bytes(method.compressor_key(compressor, keys)),
                _key_bytes(method.decoder_key(compressor, keys)),
            )
    return table


def test_each_round_and_worker_draws_anew():
    table = _keys(_make(_draws(), key=KEY))
    assert len({key for key, _ in table.values()}) == 9
    assert {decoder for _, decoder in table.values()} == {None}  # the message says all itself
    assert _keys(_make(_draws(), key=KEY)) == table
    other = _keys(_make(_draws(), key=jax.random.key(8)))
    assert not {key for key, _ in other.values()} & {key for key, _ in table.values()}


def test_a_shared_key_is_that_of_the_round():
    table = _keys(_make(_draws(shares_key=True), key=KEY))
    assert len({key for key, _ in table.values()}) == 3
    for t in range(3):
        assert len({table[t, m] for m in range(3)}) == 1
        key, decoder = table[t, 0]
        assert key == decoder


def test_takes_a_key_of_either_kind():
    old_style = _make(_draws(), key=jax.random.PRNGKey(7))
    assert _keys(old_style) == _keys(_make(_draws(), key=KEY))


def test_what_draws_nothing_takes_no_key():
    assert set(_keys(_make(TOP_K)).values()) == {(None, None)}
    with pytest.raises(ValueError, match=r"(?s)^Expected key=.* to be None: nothing here draws"):
        _make(TOP_K, key=KEY)
