"""Experiments with sasg_jax: ``python -m experiments --help``."""
