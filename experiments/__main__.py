"""``python -m experiments``: the command line."""

import signal

from experiments.cli import main

signal.signal(signal.SIGTERM, signal.default_int_handler)  # who is asked to end says how to go on
main()
