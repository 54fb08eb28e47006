"""``python -m experiments``: the command line."""

import sys

try:
    import flax  # noqa: F401
    import matplotlib  # noqa: F401
    import rich  # noqa: F401
    import tyro  # noqa: F401
except ImportError as error:
    sys.exit(
        f"The experiments need the package {error.name!r}, which is not installed. "
        'Install their packages with: pip install -e ".[experiments]"'
    )

from experiments.cli import main

main()
