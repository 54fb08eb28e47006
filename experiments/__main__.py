"""``python -m experiments``: the command line."""

import os
import signal
import sys

from experiments.cli import main

signal.signal(signal.SIGTERM, signal.default_int_handler)  # who is asked to end says how to go on
try:
    main()
except SystemExit as ended:
    if not isinstance(ended.__context__, KeyboardInterrupt):
        raise
    print(ended.code, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(1)  # jax may still compute, and crashes where Python ends around it
