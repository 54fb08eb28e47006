"""What was measured between hosts, as tables for a terminal."""

from collections.abc import Sequence

from rich.table import Table

from experiments.methods import METHODS
from experiments.report.tables import format_bytes, numbers_table
from experiments.wire.measure import Measurement


def wire_tables(title: str, measurements: Sequence[Measurement]) -> list[Table]:
    """Bytes of one worker, by ledger and by kernel; then times and memory."""
    by_host = all(m.kernel_sent for m in measurements)
    names = "Method", "Exchange"
    counts = ("Sent", "by kernel", "Received", "by kernel") if by_host else ("Sent", "by kernel")
    moved = numbers_table(f"{title}: what moves in a round", names, ("Uploads", *counts))
    moved.caption = (
        "Uploads: of all hosts, a round. "
        f"{'Of one worker that is not the server, a mean' if by_host else 'Of all hosts'}: by "
        "ledger, and as the kernel counted, headers and acknowledgements included."
    )
    headings = ("Round ms", "Compute", "Exchange", "Faster", "Worker state", "Server state")
    times = numbers_table(f"{title}: times and memory", names, headings)
    times.caption = (
        "Medians of rounds. Exchange: alone, with the same workers uploading; compute is the rest "
        "of a round. Faster: the exchange of SGD over psum takes so many times as long. State, on "
        "one device: residual and stale parameters; last messages and the residual of the way down."
    )
    dense = [m for m in measurements if (m.method, m.exchange) == ("sgd", "psum")]
    for m in measurements:
        name = METHODS[m.method].label, m.exchange
        sizes = [sum(m.ledger_sent), m.kernel_total]
        if by_host and m.kernel_sent and m.kernel_received:
            sides = m.ledger_sent, m.kernel_sent, m.ledger_received, m.kernel_received
            sizes = [m.of_a_worker(side) for side in sides]
        moved.add_row(*name, f"{m.uploads_per_round:.1f}", *map(format_bytes, sizes))
        times.add_row(
            *name,
            "" if m.round_ms is None else f"{m.round_ms:.1f}",
            "" if m.compute_ms is None else f"{m.compute_ms:.1f}",
            f"{m.communication_ms:.1f}",
            f"{dense[0].communication_ms / m.communication_ms:.1f}×" if dense else "",
            format_bytes(m.worker_state_bytes),
            format_bytes(m.server_state_bytes),
        )
    return [moved, times]
