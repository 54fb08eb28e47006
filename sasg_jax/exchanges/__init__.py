"""Exchanges: how messages get from the workers to the server and back.

These are the only modules with collectives. All but ``sharded`` have the paper's mathematics and
differ in who plays the server and in what moves:

==========  ==============================  ===================================================
name        the server is                   what moves in a round
==========  ==============================  ===================================================
``server``  worker 0, the root              uploads to the root; the step from it to each worker
``relay``   every worker                    uploads to the root, which forwards them
``gather``  every worker                    all messages to all workers, if anybody uploads
``lazy``    every worker                    only uploads, to all workers
``sharded`` every worker, of 1/M            1/M of each message to each worker, if anybody
                                            uploads; each worker's part of the step to all
``psum``    nobody: no memory is needed     the sum of messages that everybody sends
==========  ==============================  ===================================================
"""

from sasg_jax._checks import check_choice, require
from sasg_jax.exchanges.base import Exchange, Links, Needs, Traffic
from sasg_jax.exchanges.gather import GATHER
from sasg_jax.exchanges.lazy import LAZY
from sasg_jax.exchanges.psum import PSUM
from sasg_jax.exchanges.relay import RELAY
from sasg_jax.exchanges.server import SERVER
from sasg_jax.exchanges.sharded import SHARDED

EXCHANGES: dict[str, Exchange] = {x.name: x for x in (GATHER, LAZY, SERVER, RELAY, SHARDED, PSUM)}

__all__ = ["EXCHANGES", "Exchange", "Links", "Needs", "Traffic", "choose"]


def choose(exchange: str | Exchange | None, needs: Needs) -> Exchange:
    """The exchange that a user names, or what suits the method. ValueError where there is none of
    that name, or it cannot serve the method."""
    if exchange is None:
        if needs.downlink:
            return SERVER
        if not needs.always:
            return LAZY
        adds_up = needs.linear and not needs.by_sender
        return PSUM if adds_up or needs.mean_inside else GATHER
    if not isinstance(exchange, Exchange):
        exchange = EXCHANGES[check_choice("exchange", exchange, EXCHANGES)]
    reason = exchange.refuses(needs)
    require(not reason, "exchange", exchange.name, reason or "")
    return exchange
