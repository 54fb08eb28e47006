"""Which exchange a method gets."""

import itertools

import pytest

from sasg_jax.exchanges import EXCHANGES, Needs, choose

ALL_NEEDS = [Needs(*flags) for flags in itertools.product([False, True], repeat=5)]
BY_HAND = {
    # always, linear, mean_inside, downlink, by_sender
    Needs(True, True, False, False): "psum",
    Needs(True, True, False, False, True): "gather",
    Needs(True, False, True, False): "psum",
    Needs(True, False, False, False): "gather",
    Needs(False, False, False, False): "lazy",
    Needs(False, True, False, False): "lazy",
    Needs(True, True, False, True): "server",
    Needs(False, False, False, True): "server",
}


@pytest.mark.parametrize("needs", BY_HAND, ids=str)
def test_suits(needs):
    assert choose(None, needs).name == BY_HAND[needs]


@pytest.mark.parametrize("needs", ALL_NEEDS, ids=str)
def test_what_suits_can_serve(needs):
    if needs.mean_inside and (needs.downlink or needs.by_sender or not needs.always):
        return  # make_method refuses these first
    suited = choose(None, needs)
    assert choose(suited.name, needs) is choose(suited, needs) is suited


@pytest.mark.parametrize("name", EXCHANGES)
@pytest.mark.parametrize("needs", ALL_NEEDS, ids=str)
def test_refuses_what_it_cannot_serve(needs, name):
    if name == "psum":
        fits = needs.always and (needs.linear or needs.mean_inside)
        fits = fits and not needs.downlink and not needs.by_sender
    else:
        sends_a_step = name in ("server", "sharded")
        fits = not needs.mean_inside and (sends_a_step or not needs.downlink)
    if fits:
        assert choose(name, needs) is EXCHANGES[name]
    else:
        for exchange in (name, EXCHANGES[name]):
            with pytest.raises(ValueError, match=rf"^Expected exchange='{name}' to be .*\.$"):
                choose(exchange, needs)


@pytest.mark.parametrize("value", ["broadcast", 3, b"psum"])
def test_of_no_such_name(value):
    with pytest.raises(ValueError, match=rf"^Expected exchange={value!r} to be one of 'gather', "):
        choose(value, Needs(True, True, False, False))


def test_each_has_the_name_by_which_it_is_found():
    assert all(exchange.name == name for name, exchange in EXCHANGES.items())
