"""``python -m experiments``: the command line."""

import sys

try:
    import filelock  # noqa: F401
    import flax  # noqa: F401
    import jinja2  # noqa: F401
    import matplotlib  # noqa: F401
    import orbax.checkpoint  # noqa: F401
    import rich  # noqa: F401
    import tyro  # noqa: F401
except ImportError as error:
    package = error.name or str(error)
    sys.exit(
        f"The experiments need the package {package!r}, which is not installed. "
        'Install their packages with: pip install -e ".[experiments]"'
    )

from experiments.cli import main

main()
