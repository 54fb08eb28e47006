"""``python -m experiments``: the command line."""

from experiments.cli import main

main()
